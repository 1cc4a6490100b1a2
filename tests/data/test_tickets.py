"""The demo's task: splits that share nothing, messages that state their answers, a judge not fooled."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from deltaw.data.tickets import (
    FIELDS,
    PROBLEMS,
    SYSTEM_PROMPT,
    URGENCIES,
    WISHES,
    Split,
    fair_prompt,
    make_tickets,
    write_tickets,
)
from deltaw.data.tickets.heldout import HELDOUT
from deltaw.data.tickets.train import TRAIN
from deltaw.errors import UserError

SPLITS = {"train": make_tickets("train", 700), "heldout": make_tickets("heldout", 200)}
BANKS = {"train": TRAIN, "heldout": HELDOUT}
PAIR = (TRAIN, HELDOUT)


def message(example):
    return example["messages"][1]["content"]


def answer(example):
    return json.loads(example["messages"][2]["content"])


def shape(number):
    """An order number with its digits and letters made alike."""
    return re.sub("[A-Z]", "@", re.sub("[0-9]", "9", number))


def words(sentence):
    """A sentence without what the slots, the case and the punctuation add to it."""
    return re.findall(r"[a-z0-9']+|\{\w+\}", sentence.lower())


@pytest.mark.parametrize("split", get_args(Split))
class TestEachSplit:
    def test_shape_of_an_example(self, split):
        for example in SPLITS[split]:
            assert [turn["role"] for turn in example["messages"]] == ["system", "user", "assistant"]
            assert example["messages"][0]["content"] == SYSTEM_PROMPT
            content = example["messages"][2]["content"]
            assert "\n" not in content
            assert list(json.loads(content)) == list(FIELDS)
            assert content == json.dumps(json.loads(content), ensure_ascii=False, separators=(",", ":"))

    def test_answers_use_the_stated_classes(self, split):
        for example in SPLITS[split]:
            found = answer(example)
            assert found["problem"] in PROBLEMS
            assert found["wish"] in WISHES
            assert found["urgency"] in URGENCIES

    def test_copied_fields_stand_in_the_message_exactly_once(self, split):
        for example in SPLITS[split]:
            assert message(example).count(answer(example)["product"]) == 1
            order = answer(example)["order"]
            if order is not None:
                assert len(re.findall(rf"(?<!\w){re.escape(order)}(?!\w)", message(example))) == 1

    def test_message_without_order_number_shows_nothing_like_one(self, split):
        formats = {shape(pattern) for bank in BANKS.values() for pattern in bank.numbers}
        unnumbered = [example for example in SPLITS[split] if answer(example)["order"] is None]
        for example in unnumbered:
            rest = message(example).replace(answer(example)["product"], "")
            assert formats.isdisjoint(shape(word.strip(".,()")) for word in rest.split())
            assert not re.search(r"[0-9]{3}", rest)
        assert len(unnumbered) == pytest.approx(0.25 * len(SPLITS[split]), abs=2)

    def test_no_slot_is_left_open(self, split):
        assert not [message(example) for example in SPLITS[split] if re.search(r"[{}]", message(example))]

    def test_no_message_twice(self, split):
        assert len({message(example) for example in SPLITS[split]}) == len(SPLITS[split])

    def test_messages_are_short(self, split):
        lengths = [len(message(example).split()) for example in SPLITS[split]]
        assert 20 <= sum(lengths) / len(lengths) <= 26
        assert max(lengths) <= 45

    @pytest.mark.parametrize("count", [100, 200])
    def test_classes_are_balanced(self, split, count):
        answers = [answer(example) for example in SPLITS[split][:count]]
        assert set(Counter(found["problem"] for found in answers).values()) == {count // len(PROBLEMS)}
        for field, classes in (("wish", WISHES), ("urgency", URGENCIES)):
            counts = Counter(found[field] for found in answers)
            assert all(counts[name] >= 0.7 * count / len(classes) for name in classes), counts

    def test_wish_and_urgency_do_not_follow_from_the_problem(self, split):
        pairs = {(found["problem"], found["wish"]) for found in map(answer, SPLITS[split])}
        assert len(pairs) == len(PROBLEMS) * len(WISHES) - 1
        assert ("billing", "replacement") not in pairs
        cells = {(found["problem"], found["urgency"]) for found in map(answer, SPLITS[split])}
        assert len(cells) == len(PROBLEMS) * len(URGENCIES)

    def test_same_seed_same_tickets_and_fewer_are_the_first_of_more(self, split):
        assert make_tickets(split, 200) == SPLITS[split][:200]

    def test_seeds_differ(self, split):
        assert make_tickets(split, 50, seed=1) != make_tickets(split, 50, seed=2)

    def test_every_phrasing_of_the_classes_is_seen(self, split):
        everything = " ".join(message(example).lower() for example in SPLITS[split])
        for bank in (*BANKS[split].wishes.values(), BANKS[split].urgent):
            assert [sentence for sentence in bank if sentence.lower() not in everything] == []

    def test_urgency_is_said_or_not(self, split):
        for example in SPLITS[split]:
            said = any(phrase.lower() in message(example).lower() for phrase in BANKS[split].urgent)
            assert said == (answer(example)["urgency"] == "high")

    def test_bank_names_the_classes_and_fills_its_slots(self, split):
        bank = BANKS[split]
        assert set(bank.problems) == set(PROBLEMS)
        assert set(bank.wishes) == set(WISHES)
        assert all(phrase.strip() for phrase in bank.sentences())
        assert all(text.count("{product}") == 1 for texts in bank.problems.values() for text in texts)
        assert all(text.count("{order}") == 1 for text in (*bank.brackets, *bank.number_sentences))
        num_slots = sum(map(len, bank.problems.values())) + len(bank.brackets) + len(bank.number_sentences)
        assert sum(text.count("{") for text in bank.sentences()) == num_slots
        assert len(set(bank.sentences())) == len(bank.sentences())


class TestHeldoutIsNew:
    def test_brands_and_things(self):
        names = [{word for brand in bank.brands for word in brand.split() if word[0].isupper()} for bank in PAIR]
        assert names[0].isdisjoint(names[1])
        assert set(TRAIN.brands).isdisjoint(HELDOUT.brands)
        assert set(TRAIN.things).isdisjoint(HELDOUT.things)

    def test_sentences(self):
        train, heldout = ({tuple(words(text)) for text in bank.sentences()} for bank in PAIR)
        assert train.isdisjoint(heldout)

    def test_no_heldout_class_sentence_contains_a_training_one(self):
        old, new = ({" ".join(words(text)) for text in bank.classified()} for bank in PAIR)
        pairs = [(a, b) for a in old for b in new if f" {a} " in f" {b} " or f" {b} " in f" {a} "]
        assert pairs == []

    def test_formats_of_order_numbers(self):
        train, heldout = ({shape(pattern) for pattern in bank.numbers} for bank in PAIR)
        assert train.isdisjoint(heldout)

    def test_in_the_messages_themselves(self):
        seen = [{answer(e)["product"] for e in SPLITS[split]} for split in SPLITS]
        shapes = [{shape(answer(e)["order"] or "") for e in SPLITS[split]} - {""} for split in SPLITS]
        assert seen[0].isdisjoint(seen[1])
        assert shapes[0].isdisjoint(shapes[1])
        train_text = "\n".join(message(example) for example in SPLITS["train"])
        assert not [name for name in (*HELDOUT.brands, *HELDOUT.things) if f" {name} " in train_text]

    def test_training_is_varied(self):
        assert all(len(bank) >= 28 for bank in (*TRAIN.problems.values(), *TRAIN.wishes.values(), TRAIN.urgent))
        assert all(len(bank) >= 10 for bank in (*HELDOUT.problems.values(), *HELDOUT.wishes.values()))


def test_same_in_another_process():
    code = "import json, deltaw.data.tickets as t; print(json.dumps(t.make_tickets('heldout', 30)))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(run.stdout) == SPLITS["heldout"][:30]


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"'test'.*train, heldout"):
        make_tickets("test", 3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="-1"):
        make_tickets("train", -1)
    assert make_tickets("train", 0) == []


def test_write_tickets(tmp_path: Path):
    path = write_tickets(tmp_path / "new" / "tickets.jsonl", "train", 25, seed=3)
    lines = path.read_bytes().decode().splitlines()
    assert [json.loads(line) for line in lines] == make_tickets("train", 25, seed=3)


class TestFairPrompt:
    example = SPLITS["heldout"][0]

    def test_turns(self):
        prompt = fair_prompt(self.example)
        assert [turn["role"] for turn in prompt] == ["system", *["user", "assistant"] * 3, "user"]
        assert prompt[-1]["content"] == message(self.example)
        assert prompt[:-1] == fair_prompt(SPLITS["heldout"][1])[:-1]

    def test_says_all_keys_and_values(self):
        system = fair_prompt(self.example)[0]["content"]
        assert all(f'"{name}"' in system for name in (*FIELDS, *PROBLEMS, *WISHES, *URGENCIES))

    def test_worked_examples_are_varied_and_from_training(self):
        turns = fair_prompt(self.example)
        answers = [json.loads(turn["content"]) for turn in turns if turn["role"] == "assistant"]
        for field in ("product", "order", "problem", "wish"):
            assert len({found[field] for found in answers}) == 3
        assert {found["urgency"] for found in answers} == set(URGENCIES)
        assert answers[0]["order"] is None
        assert not [found for found in answers if found["product"].endswith(HELDOUT.things)]

    def test_does_not_give_the_answer_away(self):
        rest = json.dumps(fair_prompt(self.example)[:-1])
        assert answer(self.example)["product"] not in rest

    def test_callers_cannot_spoil_later_prompts(self):
        before = json.dumps([fair_prompt(self.example), self.example])
        for turn in fair_prompt(self.example):
            turn["content"] = "spoilt"
        assert json.dumps([fair_prompt(self.example), self.example]) == before


WANTED = '{"product": "Solveig floor lamp", "order": null, "problem": "late", "wish": "refund", "urgency": "high"}'
