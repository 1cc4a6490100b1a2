"""The training bank."""

from .wording import Wording, items, lines

_BRANDS = items("""
    Corvo, Lumo, blue Fennel, Oster & Hale, Kestrel 7, red Swiftline, Torvo, Zephyr, Castagna, grey Piperell,
    BrewMate 12, Solveig, brass Juno, Pedalia, Gravelking, Moss & Finch, Vento X2, Marlowe, white Sonetto,
    black Bassline, Echo Valley, Hush 2, Quarto 500, golden Candela, Nightowl 3, Polaris, Typhoon, Glide Pro, Tern 24,
    white Scribe, Inkwell 3100, Fjell, Harbor, Aldous, green Loft, beige Bergen, Haven, Kelp, Ivy & Elm, Tidal, Dusty 4,
    purple Pluma, silver Rondo, Aurora, Studio Arc, brown Pixie, yellow Firefly, pale blue Wren, Node,
    dark blue Tarn, Birch & Lane
""")

_THINGS = items("""
    hand blender, toaster, kettle, stand mixer, coffee machine, egg cooker, waffle iron, rice cooker, vacuum cleaner,
    sewing machine, hair dryer, toothbrush, city bike, bike bell, rear light, floor pump, bike lock, e-scooter,
    headset, radio, soundbar, speaker, record player, microphone, alarm clock, amplifier, floor lamp, reading light,
    wall lamp, ceiling light, keyboard, mouse, monitor, tablet, webcam, printer, hard drive, router, bookcase,
    armchair, coffee table, nightstand, sofa, stool, shoe cabinet, bench, juicer, oven
""")

_NUMBERS = items("""
    99999, 999-999, @@-9999, 24-9999, 9999-@, 999999, @9999, SO/9999, 99-99-99, @@@999, WEB-9999, 9999999, R9.999,
    @9@9, 999/999, @-9999, 9999@, KL_999, 9-999-@, @@9999, @@9-99
""")

_PROBLEMS = {
    "broken": lines("""
        My {product} is broken.
        The {product} stopped working after two days.
        The {product} arrived with a big crack.
        My {product} died yesterday.
        My {product} fell apart the first time I used it.
        The {product} came dented and scratched.
        The {product} does not work at all.
        My new {product} is defective.
        Our {product} quit after a week of normal use.
        A piece of my {product} snapped off.
        The {product} was delivered in pieces.
        There is a deep crack in the {product}.
        My {product} has a fault, it keeps failing.
        The {product} was damaged on its way to me.
        The {product} has never worked, not even once.
        My {product} won't turn on.
        We were careful with our {product} and it still broke.
        I opened the box and the {product} was smashed.
        My {product} worked for an hour and then never again.
        The {product} broke on the very first day.
        Sadly the {product} is faulty.
        My {product} is cracked, you can see it at first glance.
        Since Monday our {product} does not work.
        Since this morning my {product} is dead.
        My {product} has been broken since Tuesday.
        I pressed every button, the {product} is dead.
        The {product} no longer works.
        Something inside my {product} is loose and it does not run.
        Our {product} makes a loud noise and then stops.
        The {product} gets hot and switches itself off.
        My {product} does not start any more.
        The {product} I received is damaged.
        The back of my {product} came off, it is broken.
    """),
    "late": lines("""
        My {product} has not arrived yet.
        I am still waiting for the {product}.
        The {product} should have been here last week.
        My {product} never showed up.
        It has been three weeks and my {product} is still not here.
        The delivery date for the {product} has passed.
        There is no sign of my {product}.
        The {product} was due on Monday and nobody delivered it.
        The tracking for my {product} has not moved in ten days.
        My parcel with the {product} is lost.
        I bought the {product} a month ago and nothing has come.
        The courier never brought my {product}.
        Our {product} is very late.
        You promised the {product} within five days, that was two weeks ago.
        So far the {product} has not been delivered.
        I have been waiting for my {product} for ages.
        Twelve days after my order the {product} is still not here.
        The package with our {product} never came.
        My {product} is stuck in some depot.
        The delivery of my {product} is overdue.
        The postman came every day but never with my {product}.
        I have not received the {product}.
        The {product} hasn't even been shipped.
        Where is my {product}? It is long overdue.
        According to your mail the {product} would come on the 3rd, it did not.
        The shipment with my {product} is delayed again.
        No parcel, no message, the {product} has not reached me.
        When will my {product} finally be delivered?
        Our {product} has been on its way for a whole month.
        I ordered the {product} long ago and it still hasn't come.
        I never got the {product}, the parcel is missing.
        By now the {product} is five days late.
    """),
    "wrong item": lines("""
        I ordered the {product} but got something else.
        You sent me the wrong product instead of the {product}.
        The {product} came in the wrong colour.
        I was sent the wrong size of the {product}.
        What came is not the {product} that I ordered.
        Somebody mixed up my order, it should be the {product}.
        The {product} is a different model from the one I picked.
        I asked for the {product} and was given another thing.
        You shipped the wrong item, I wanted the {product}.
        The wrong product was delivered, not the {product}.
        The {product} is in another colour than the one I chose.
        This {product} is not the version I ordered.
        I got someone else's parcel and not the {product}.
        There has been a mix-up with the {product}, I got a different one.
        The {product} is the small one, I had ordered the large one.
        You delivered something else, not the {product}.
        The item in the box does not match my order, I ordered the {product}.
        What I unpacked was a different product, not the {product}.
        The {product} you sent is the wrong model.
        The colour of the {product} is not what I ordered.
        I wanted the {product}, this is a completely different item.
        You mixed up two parcels, I should have the {product}.
        I picked the {product} and you sent the wrong type.
        The {product} has another size than the one I ordered.
        This isn't the {product} I ordered at all.
        Instead of the {product} I received the wrong thing.
        I received a different {product} than the one I ordered.
        The item that arrived is not the {product}.
        The thing in the parcel isn't the {product} I bought.
        The box says {product}, but another product is inside.
        It is the wrong {product}, I ordered the other version.
        You packed the wrong article, my order was for the {product}.
    """),
    "billing": lines("""
        I was charged twice for the {product}.
        My card was debited two times for the {product}.
        The invoice for my {product} is wrong.
        You took too much money for the {product}.
        I paid $49 for the {product} although the price was $39.
        The discount was not applied when I bought the {product}.
        There is an extra fee on the bill for my {product}.
        You billed me for two of the {product}, I only bought one.
        The amount on my bank statement for the {product} is too high.
        I was overcharged for the {product}.
        The bill for the {product} shows a fee for free delivery.
        My statement lists the payment for the {product} two times.
        The receipt for the {product} has the wrong total.
        I got an invoice for the {product} again, I already paid it.
        The voucher for my {product} was not deducted.
        You charged me the full price for the {product} during the sale.
        An extra 12 euros were added to the bill for the {product}.
        PayPal shows two payments for my {product}.
        The tax on the invoice for the {product} is wrong.
        I see a double charge for the {product} on my account.
        The price I paid for the {product} is not the price on your site.
        I get payment reminders for the {product}, though I have paid.
        The payment for my {product} was taken from my account twice.
        My credit card was charged too much for the {product}.
        The sum on the invoice for my {product} is not the agreed price.
        The {product} cost more at the checkout than on the page.
        You charged the wrong price for my {product}.
        You sent me a second bill for the {product}.
        The coupon for the {product} was ignored and I paid too much.
        Somehow I ended up paying double for my {product}.
    """),
}

_WISHES = {
    "refund": lines("""
        I want my money back.
        Please refund me.
        I would like a full refund.
        Please return the money to my card.
        Please pay the money back.
        I'd like to be reimbursed.
        Give me back what I paid.
        I want back all that I paid.
        Can I get a refund please?
        Transfer the money back to me, please.
        I expect a refund for this.
        Could you refund the amount to my card?
        I am asking for a refund.
        Please issue a refund.
        I would like my payment returned.
        Send my money back, please.
        Just repay me.
        I request that you refund the purchase.
        I only want to have my money returned.
        Please arrange a refund to my bank account.
        Would you please reimburse me?
        I want a refund, nothing else.
        Please put the money back on my credit card.
        Kindly refund the payment.
        Money back, please.
        I'd prefer my money back.
        I ask you to pay me back.
        Please give me a refund.
        Refund my money.
    """),
    "replacement": lines("""
        Please send me a new one.
        I would like a replacement.
        Can you ship me another one?
        I want a new one sent to my address.
        Could I have a new one, please?
        Please replace it.
        Just send another one.
        I'd like you to send a second one.
        Please post me a new one.
        I am asking for a replacement.
        I would be happy with another one.
        Would you please deliver a new one?
        I hope you can send me a replacement.
        What I want is a replacement.
        Please put another one in the post.
        Ship a new one, that is all I ask.
        Can you organise a replacement?
        Please issue a replacement.
        Get me another one, please.
        I request a replacement.
        Let me have a new one.
        I expect you to send a new one.
        I only want a new one, nothing else.
        Please provide me with another one.
        Would it be possible to get a new one?
        New one, please.
        I'd prefer a replacement.
        Please mail me another one.
    """),
    "callback": lines("""
        Please call me.
        I would like you to phone me.
        Could someone give me a ring?
        Please call me back.
        I'd like to talk to someone on the phone.
        Can you ring me, please?
        Please have an agent phone me.
        I want to speak with a person, please call.
        Please give me a call on my mobile.
        Please ring my number.
        I'd prefer to discuss this over the telephone.
        Would you please call me back?
        A phone call from your team is what I want.
        I expect a call from you.
        Just call me, you have my number.
        I am asking for a callback.
        Have your service team telephone me.
        Let us talk about it by phone.
        Could I get a phone call?
        I request a call from one of your staff.
        Call my mobile, please.
        Please let a colleague call me at home.
        Phone me, please.
        Ring me on the number in my account.
        Can one of you call me about this?
        Please arrange a telephone call.
        I only want a call, nothing else.
        Someone should phone me about it.
        I want someone to call me back.
        I would like to be called.
        Could somebody phone me, please?
        Can a person from your staff call me?
        Give me a quick call.
    """),
}

_URGENT = lines("""
    This is urgent!
    I need this solved today.
    Please hurry.
    It has to happen before Friday.
    I need it as soon as possible.
    ASAP please!
    This can't wait.
    It is an emergency.
    Please do this immediately.
    I need it by tomorrow.
    I have very little time.
    Please treat this with top priority.
    I must have this done by tonight.
    Please be quick.
    I need a solution right now.
    Please act at once.
    Please be fast, we can't wait.
    It must be done within 24 hours.
    I am in a hurry.
    I can't wait any longer.
    High priority please.
    Please do it right away.
    It is extremely urgent for us.
    I need this done by tomorrow morning.
    I really need this now.
    The matter is urgent.
    Do it today, please.
    I have a deadline on Thursday, so please hurry.
    As quickly as you can, please.
    It is very urgent, I need it before the weekend.
    We need it before Sunday.
    I need an answer by Monday.
    We need this solved before our holidays.
    It must be settled this week.
    I need a solution before the end of the week.
    Please, as fast as possible.
    We urgently need this.
    There is no time to lose.
    Please solve this before Wednesday.
    This must not wait.
    Please give it priority.
    Give me priority, please.
""")

TRAIN = Wording(
    brands=_BRANDS,
    things=_THINGS,
    numbers=_NUMBERS,
    problems=_PROBLEMS,
    wishes=_WISHES,
    urgent=_URGENT,
    brackets=lines("""
        (order {order})
        ({order})
        (no. {order})
        from order {order}
        (order number {order})
        (order: {order})
    """),
    number_sentences=lines("""
        My order number is {order}.
        Order {order}.
        The order number is {order}.
        Order number: {order}.
        It was order {order}.
        The reference is {order}.
        Ref. {order}.
        I ordered under number {order}.
        See order {order}.
        My order no.: {order}.
        The order in question is {order}.
        Order ID {order}.
        It belongs to order {order}.
        For your records: {order}.
    """),
    greetings=lines("""
        Hi,
        Hello,
        Hello!
        Hi there,
        Dear team,
        Good morning,
        Hey,
        Dear Sir or Madam,
        Greetings,
    """),
    sign_offs=lines("""
        Thanks
        Thank you!
        Regards, Anna
        Best, Tom
        Kind regards, Paul
        Thanks, Maria
        Best wishes, Ken
        Cheers, Joe
        Many thanks
        Thanks in advance
    """),
)
