"""The held-out bank: products and formats of order numbers that training never shows, and new sentences."""

from .wording import Wording, items, lines

_BRANDS = items("""
    Greenrow, Thistle 36, teal Hornet, orange Meadow, Oakham, Ridgeback, Fern & Fox, Summit Haus, light grey Trailfox,
    Northpeak 60, Larkspur, Minou, pink Wobble, Clover & Tot, AirFlow 300, Cloudlet, Ember & Ash, Breeze Petite,
    Nimbus 8, Brightside, Papyrus 9, grey Ledger, Orbit, Stanmore
""")

_THINGS = items("""
    hedge trimmer, lawn mower, leaf blower, chainsaw, hose reel, bird feeder, wheelbarrow, plant pot, tent, backpack,
    stroller, high chair, rocking horse, fan, humidifier, heater, air purifier, desk lamp, e-reader, shredder,
    label maker, office chair, filing cabinet, treadmill
""")

_NUMBERS = items("9999/99, 99-999-@, PO.9999, 9999-@@, @-99-@-99, 99/999/9, ET_9999, 99@999")

_PROBLEMS = {
    "broken": lines("""
        My {product} refuses to work.
        The {product} has a crack down the middle and is useless.
        Since yesterday my {product} is dead.
        The {product} got badly damaged during transport.
        Our {product} worked fine for one afternoon, then it failed.
        When I unpacked the {product}, it was broken.
        My {product} has a serious defect.
        I can't use the {product}, it won't switch on.
        My {product} broke in two.
        The {product} has stopped working.
    """),
    "late": lines("""
        My {product} was supposed to arrive two weeks ago.
        To this day I have not received my {product}.
        Nobody knows where my {product} is; it was never delivered.
        The promised delivery day for my {product} passed without a parcel.
        I keep waiting for our {product} to be delivered.
        My {product} still hasn't arrived.
        The delivery of the {product} is already ten days late.
        After twenty days the {product} still isn't here.
        According to tracking, my {product} is still not shipped.
        The parcel with my {product} is very late.
    """),
    "wrong item": lines("""
        I was expecting the {product}, yet the parcel contained something else.
        You have mixed up my order, I wanted the {product}.
        That's not what I bought, I ordered the {product}.
        You gave me a different item in place of the {product}.
        The product that came isn't the {product}.
        My {product} has the wrong colour.
        Apparently I got another customer's parcel rather than the {product}.
        My {product} is the wrong model, not the one I ordered.
        You sent a different version of the {product}.
        I received the wrong item, it should have been the {product}.
    """),
    "billing": lines("""
        My bank account shows that I paid twice for the {product}.
        The total on my invoice for the {product} is too high.
        You took the money for the {product} two times.
        I was billed 20 dollars too much for the {product}.
        The bill for my {product} is wrong.
        My discount was not taken off the price of the {product}.
        The {product} is on my credit card statement with a higher price than agreed.
        There's an unknown charge on the invoice for the {product}.
        I already paid for the {product}, and now you have billed me again.
        You've charged the wrong amount for my {product}.
    """),
}

_WISHES = {
    "refund": lines("""
        I'd like to have my money returned.
        Please send the money back to my bank account.
        Would you kindly give me a refund?
        I insist on getting my money back.
        Please reimburse the cost.
        What I'd like is a refund to my card.
        Refund the money, please.
        Could I have back what I paid?
        I want you to repay the price.
        Please see to it that I get refunded.
    """),
    "replacement": lines("""
        Please let me have a replacement.
        Could another one be sent to me?
        I want you to send a new one.
        A replacement is all I'm asking for.
        Please get a new one on its way to me.
        Is it possible to have another one mailed to me?
        I'd love to receive a new one.
        Send me a replacement, please.
        It would be fair if you shipped me a new one.
        Please deliver another one to my home.
    """),
    "callback": lines("""
        Please have someone call me.
        I'd appreciate a phone call.
        Could you telephone me about this?
        Give me a call, please.
        I want to be called back.
        Please ring me at home.
        Can somebody from your team phone me?
        It's easiest if you call me on my phone.
        I'd like to speak to someone by telephone.
        I'd be happy if you gave me a ring.
    """),
}

_URGENT = lines("""
    It's really urgent.
    You have to be quick, I need it tomorrow.
    I need this done immediately.
    Please take care of it today.
    This cannot wait any longer.
    I'm in a great hurry.
    Please do it as fast as you can.
    This is an urgent matter.
    We need a solution before the weekend.
    Please give this the highest priority.
    I need this right away.
    Hurry up with this, please.
""")

HELDOUT = Wording(
    brands=_BRANDS,
    things=_THINGS,
    numbers=_NUMBERS,
    problems=_PROBLEMS,
    wishes=_WISHES,
    urgent=_URGENT,
    brackets=lines("""
        (order no. {order})
        from my order {order}
        (number {order})
    """),
    number_sentences=lines("""
        The number of my order is {order}.
        My order: {order}.
        The order has the number {order}.
        Order reference {order}.
        My order is {order}.
        The order ID is {order}.
    """),
    greetings=lines("""
        Good afternoon,
        Dear support team,
        Hello everyone,
        Good day,
    """),
    sign_offs=lines("""
        Thank you very much
        Warm regards, Elena
        All the best, Omar
        Thank you, Jack
        With kind regards, Nina
    """),
)
