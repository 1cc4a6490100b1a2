"""`deltaw eval`, `compare` and `chat` on a small model with adapters."""

import io
import math
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from deltaw.cli.chat import Conversation
from deltaw.cli.chat import Options as ChatOptions
from deltaw.cli.compare import _short
from deltaw.engine.generate import Sampling, generate
from deltaw.errors import UserError
from deltaw.nn.load import load_base
from deltaw.train.evaluate import mean_loss
from deltaw.train.forward import examine
from deltaw.train.options import TrainOptions
from deltaw.train.prepare import prepare


@pytest.fixture
def held_out(data, tiny_base):
    return prepare(TrainOptions(data=data, model=str(tiny_base), dtype="float32", max_length=64)).train.examples


# --- eval ---


def test_eval_measures_base_and_adapter(run, data, tiny_base, adapters, held_out, only_json):
    args = ["eval", "--data", data, "--dtype", "float32", "--max-length", 64, "--json"]
    code, out, _ = run(*args, "--model", tiny_base)
    base = only_json(out)
    model, _ = load_base(tiny_base, dtype="float32")
    wanted, supervised = mean_loss(examine(model), held_out, 10_000)
    assert code == 0
    assert base["loss"] == pytest.approx(wanted, rel=1e-6) and base["perplexity"] == pytest.approx(math.exp(wanted))
    assert (base["supervised_tokens"], base["examples"], base["exact_match"]) == (supervised, 6, None)
    adapted = only_json(run(*args, "--adapter", adapters["first"])[1])  # which names its base itself
    assert adapted["loss"] != pytest.approx(base["loss"], rel=1e-5)


def test_eval_tells_people_too(run, data, tiny_base):
    args = ["eval", "--data", data, "--model", tiny_base, "--max-length", 36, "--max-new-tokens", 2]
    code, out, _ = run(*args, "--match", "text", "--limit", 4)
    words = " ".join(out.split())
    assert code == 0
    assert re.search(r"loss \d+\.\d{4} perplexity [\d.]+ over \d+ supervised tokens of 4 examples", words)
    assert "exact answers 0.0% of 4 examples" in words


def test_eval_says_what_the_loss_has_not_seen(run, data, tiny_base, only_json):
    args = ["eval", "--data", data, "--model", tiny_base, "--max-length", 34]
    found = only_json(run(*args, "--json")[1])
    code, out, _ = run(*args)
    cut, lost = found["truncated_examples"], found["unsupervised_examples"]
    assert code == 0 and 0 < lost < cut <= 6 and found["examples"] == 6
    assert f"supervised tokens of {6 - lost} examples" in out
    assert f"{cut} examples are longer than --max-length 34: the loss has not seen what is behind it" in out
    assert "left out of the loss: nothing of the answer within --max-length 34 (first: " in out
    assert f"(first: {found['first_unsupervised']}); raise it to count them" in out


def test_eval_and_compare_read_the_split_that_is_named(run, adapters, monkeypatch, only_json):
    import datasets

    asked = []

    def load_dataset(repository, name=None, split=""):
        asked.append((repository, name, split))
        return [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for verb in (["eval", "--max-length", 64], ["compare", "--max-new-tokens", 2]):
        args = [*verb, "--adapter", adapters["first"], "--data", "some/data:main"]
        assert run(*args)[0] == run(*args, "--data-split", "validation")[0] == 0
    assert asked == [("some/data", "main", split) for split in ("test", "validation")] * 2


def test_eval_refuses_what_it_cannot_measure(run, data, tiny_base):
    code, out, err = run("eval", "--data", data, "--model", tiny_base)
    assert code == 2 and not out
    assert "--max-length 1024: the model takes at most 512 tokens; lower it" in err
    code, _, err = run("eval", "--data", data, "--model", tiny_base, "--max-length", 64, "--match", "json")
    assert code == 2 and "6 of 6 wanted answers are no JSON object" in err


# --- compare ---


def test_compare_shows_both_side_by_side(run, data, tiny_base, adapters, only_json):
    args = ["compare", "--adapter", adapters["first"], "--data", data, "--dtype", "float32", "--max-new-tokens", 6]
    code, out, _ = run(*args, "--n", 3, "--json")
    found = only_json(out)
    assert code == 0
    assert [row["wanted"] for row in found["compared"]] == ["red", "green and white", "north"]  # spread evenly
    assert [row["prompt"] for row in found["compared"]] == ["Say red", "Say green and white", "Say north"]
    assert all(row["base"] != row["adapter"] for row in found["compared"])
    assert found["adapter_bytes"] == (adapters["first"] / "adapter_model.safetensors").stat().st_size
    model, tokenizer = load_base(tiny_base, dtype="float32")
    assert found["base_bytes"] == sum(p.nbytes for p in model.parameters())
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Say red"}], add_generation_prompt=True)[
        "input_ids"
    ]
    said = tokenizer.decode(generate(model, [ids], Sampling(max_new_tokens=6))[0], skip_special_tokens=True).strip()
    assert found["compared"][0]["base"] == said

    code, out, _ = run(*args, "--n", 100)
    assert code == 0 and out.count("prompt") == 6
    assert "exact answers: base 0 of 6, with the adapter 0 of 6." in " ".join(out.split())


def test_an_adapter_of_another_base_needs_a_word(run, data, tiny_base, adapters, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    weights = load_file(other / "model.safetensors")
    save_file({k: v + 1e-3 for k, v in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    for args in (["eval", "--max-length", 64], ["compare", "--max-new-tokens", 2]):
        given = [*args, "--data", data, "--model", other, "--adapter", adapters["first"]]
        code, _, err = run(*given)
        assert code == 2 and "load that base, or allow another one (allow_other_base)" in err
        assert run(*given, "--allow-other-base")[0] == 0
    Conversation(ChatOptions(adapter=(str(adapters["first"]),), model=str(other), allow_other_base=True))


def test_a_base_that_is_gone_can_be_named_elsewhere(run, data, tiny_base, tmp_path):
    here, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny_base, here)
    args = ["--data", data, "--max-length", 256]
    assert run("train", "--model", here, *args, "--max-steps", 1, "--out", out)[0] == 0
    shutil.rmtree(here)
    code, _, err = run("eval", "--adapter", out, *args)
    assert code == 2 and "--model says where it is here" in err.splitlines()[-1]
    assert run("eval", "--adapter", out, "--model", tiny_base, *args)[0] == 0


def test_long_answers_are_shortened_for_people():
    assert _short("x" * 600) == "x" * 600
    assert _short("x" * 601).endswith("x …")


# --- chat ---


@pytest.fixture
def chat(run, monkeypatch, tiny_base):
    """``chat("hello", "/reset", adapter=…)``: what stands on both outputs after these lines."""

    def say(*lines, args=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        base = () if "--adapter" in args else ("--model", tiny_base)
        code, out, err = run("chat", *base, *args, "--dtype", "float32", "--max-new-tokens", 6)
        assert code == 0
        return out, err

    return say


def test_chat_answers_and_remembers_until_it_is_told_to_forget(chat):
    once = chat("hello")[0]
    assert len(once.strip()) > 0
    out, _ = chat("hello", "hello", "/reset", "hello")
    assert out.startswith(once) and out.endswith("forgotten\n" + once)
    assert out != once + once + "forgotten\n" + once  # the second time it had the first before it


def test_chat_switches_adapters_in_the_middle(chat, adapters):
    first, second = adapters["first"], adapters["second"]
    out, err = chat(
        "/adapters", "hello", "/reset", f"/adapter {second}", "hello", "/reset", "/adapter base", "hello", "/adapter",
        "/adapter my-adapter--v1-0", "/adapters", args=["--adapter", first],
    )  # fmt: skip
    assert "loading" in err
    listed, by_first, _, now_second, by_second, _, now_base, by_base, *rest = out.splitlines()
    assert listed == "base, my-adapter--v1-0"
    assert now_second == "now answering: my-adapter--v1-0-2"  # the same folder's name, but another folder
    assert now_base == "now answering: base"
    assert len({by_first, by_second, by_base}) == 3
    assert rest == [
        "base, my-adapter--v1-0, my-adapter--v1-0-2",
        "now answering: my-adapter--v1-0",
        "base, my-adapter--v1-0, my-adapter--v1-0-2",
    ]
    assert chat("hello")[0] == by_base + "\n"


def test_chat_survives_slips(chat, adapters, tmp_path):
    out, err = chat("/adapter ./nope", "/adapter " + str(tmp_path), "word " * 600, "/nonsense", "", "/system Be brief",
                    "/system", "/exit", "never reached", args=["--adapter", adapters["first"]])  # fmt: skip
    words = " ".join(err.split())
    assert "./nope: no such folder" in words and "(loaded are base, my-adapter--v1-0)" in words
    assert "is not an adapter" in words
    assert "more than the model's 512" in words
    assert "/adapter NAME" in out and "system message set\nno system message\n" in out
    assert "Traceback" not in err


def test_a_conversation_keeps_what_was_active_when_a_load_fails(tiny_base, adapters, tmp_path):
    folder = tmp_path / "base"  # a name that means "no adapter" to /adapter
    shutil.copytree(adapters["second"], folder)
    conversation = Conversation(ChatOptions(adapter=(str(adapters["first"]), str(folder)), dtype="float32"))
    assert conversation.active == "my-adapter--v1-0" and conversation.loaded == ["my-adapter--v1-0", "base-2"]
    with pytest.raises(UserError, match="loaded are base, my-adapter--v1-0, base-2"):
        conversation.use("nope")
    assert conversation.active == "my-adapter--v1-0"
    conversation.use(str(folder))
    assert conversation.active == "base-2" and len(conversation.loaded) == 2


def test_the_prompt_is_the_template_with_all_that_was_said(tiny_base):
    conversation = Conversation(ChatOptions(model=str(tiny_base), dtype="float32", system="Be brief."))
    conversation.messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = conversation.tokenizer.decode(conversation.prompt("c"))
    parts = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    assert (
        text == "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in parts) + "<|im_start|>assistant\n"
    )
