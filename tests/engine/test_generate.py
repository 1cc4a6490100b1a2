"""Generation: layout, company and streaming never change what a model says."""

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from deltaw.config import LoraConfig
from deltaw.engine import generate as module
from deltaw.engine.generate import Sampling, generate, stream
from deltaw.errors import UserError
from deltaw.nn.batch import BASE, Batch, batch
from deltaw.nn.inject import activate, inject

GREEDY = Sampling(max_new_tokens=12)


def _prompts(*lengths, shared=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    prefix = torch.randint(3, 97, (shared,), generator=g).tolist()
    return [prefix + torch.randint(3, 97, (n,), generator=g).tolist() for n in lengths]


def _alone(model, prompts, sampling=GREEDY):
    return [generate(model, [prompt], sampling)[0] for prompt in prompts]


def test_a_batch_says_what_each_prompt_says_alone(tiny, architecture):
    model, prompts = tiny(architecture), _prompts(5, 1, 17, 9)
    assert generate(model, prompts, GREEDY) == _alone(model, prompts)
    assert generate(model, prompts, GREEDY, batch_size=3) == _alone(model, prompts)


def test_a_shared_prefix_changes_nothing(tiny, architecture, monkeypatch):
    model, prompts = tiny(architecture), _prompts(5, 1, 17, 9, shared=8)
    monkeypatch.setattr(module, "MIN_SHARED_PREFIX", 1000)
    without = generate(model, prompts, GREEDY)
    monkeypatch.setattr(module, "MIN_SHARED_PREFIX", 4)
    assert module._shared_prefix(prompts) == 8
    assert generate(model, prompts, GREEDY) == without == _alone(model, prompts)


def test_a_prompt_that_is_the_prefix_of_another_keeps_its_last_token(monkeypatch, tiny):
    monkeypatch.setattr(module, "MIN_SHARED_PREFIX", 2)
    model, (long,) = tiny(), _prompts(9)
    prompts = [long[:4], long, long]
    assert module._shared_prefix(prompts) == 3
    assert generate(model, prompts, GREEDY) == _alone(model, prompts)


def test_sliding_windows_do_not_count_padding(monkeypatch):
    # Padding between prefix and rest would push the prefix out of a window that is counted in places.
    monkeypatch.setattr(module, "MIN_SHARED_PREFIX", 2)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=8, max_position_embeddings=128,
    )  # fmt: skip
    model, prompts = AutoModelForCausalLM.from_config(config).eval(), _prompts(4, 12, 2, shared=6)
    assert generate(model, prompts, GREEDY) == _alone(model, prompts)


@pytest.mark.real
def test_the_real_model_in_company_and_behind_a_shared_prefix(real_base):
    model, tokenizer = real_base
    asked = ["Name three colours.", "What is the capital of France?", "Say hello to my friend Ann, who is a doctor."]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "system", "content": "You are a helpful assistant. " * 6}, {"role": "user", "content": text}],
            add_generation_prompt=True,
        )["input_ids"]
        for text in asked
    ]
    assert module._shared_prefix(prompts) > 32
    sampling = Sampling(max_new_tokens=12)
    alone = _alone(model, prompts, sampling)
    assert generate(model, prompts, sampling) == alone
    assert list(stream(model, prompts[1], sampling)) == alone[1]
    assert "Paris" in tokenizer.decode(alone[1])


def _ending_with(model, prompt, at):
    """Let the token that the model says at place ``at`` be its end token; returns what comes before."""
    said = generate(model, [prompt], GREEDY)[0]
    model.generation_config.eos_token_id = [said[at], 2]
    return said[: said.index(said[at])]


def test_stops_at_the_end_token_and_leaves_it_out(tiny):
    model, prompts = tiny(), _prompts(6, 3)
    before = _ending_with(model, prompts[0], 5)
    assert generate(model, prompts, GREEDY)[0] == before
    assert list(stream(model, prompts[0], GREEDY)) == before


def test_no_prompt_and_prompts_that_cannot_be_continued(tiny):
    model = tiny()
    assert generate(model, [], GREEDY) == []
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate(model, [[3], []], GREEDY)
    with pytest.raises(UserError, match="prompt 0 has 117 tokens, with 12 new ones more than the model's 128"):
        generate(model, _prompts(117), GREEDY)
    with pytest.raises(UserError, match="the prompt is empty"):
        next(stream(model, [], GREEDY))
    assert len(generate(model, _prompts(116), GREEDY)[0]) == 12


@pytest.mark.parametrize("bad", [dict(max_new_tokens=0), dict(temperature=-1), dict(top_p=0), dict(top_p=float("nan"))])
def test_sampling_that_makes_no_sense_is_refused(bad):
    with pytest.raises(UserError, match="expected"):
        Sampling(**bad)


def test_sampling_is_seeded(tiny):
    model, prompts = tiny(), _prompts(6, 3)
    first, again, other = (
        generate(model, prompts, Sampling(max_new_tokens=12, temperature=1.0, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first != generate(model, prompts, GREEDY)
    narrow = Sampling(max_new_tokens=12, temperature=1.0, top_p=1e-6)
    assert generate(model, prompts, narrow) == generate(model, prompts, GREEDY)


def test_progress_is_told_after_each_batch(tiny):
    told = []
    generate(tiny(), _prompts(3, 3, 3), GREEDY, batch_size=2, progress=lambda *p: told.append(p))
    assert told == [(2, 3), (3, 3)]


def test_a_stream_is_what_generate_says(tiny, architecture):
    model, prompts = tiny(architecture), _prompts(5)
    assert list(stream(model, prompts[0], GREEDY)) == generate(model, prompts, GREEDY)[0]
    warm = Sampling(max_new_tokens=8, temperature=0.9, seed=4)
    assert list(stream(model, prompts[0], warm)) == generate(model, prompts, warm)[0]


def test_closing_a_stream_ends_its_thread(tiny):
    before = threading.active_count()
    tokens = stream(tiny(), [5, 6, 7], Sampling(max_new_tokens=100))
    next(tokens)
    assert threading.active_count() == before + 1
    tokens.close()
    assert threading.active_count() == before


def test_an_error_in_the_thread_reaches_the_caller(tiny):
    with pytest.raises(IndexError):
        list(stream(tiny(), [5, 1000], GREEDY))


def test_a_stream_sees_active_adapters_and_the_callers_batch(tiny):
    model, prompt = tiny(), _prompts(6)[0]
    base = generate(model, [prompt], GREEDY)[0]
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        inject(model, LoraConfig(r=8, lora_alpha=200, target_modules="all-linear", init_lora_weights=False), name)
    said = {}
    for name in ("one", "two"):
        activate(model, [name], trainable=False)
        said[name] = generate(model, [prompt], GREEDY)[0]
        assert list(stream(model, prompt, GREEDY)) == said[name] != base
    assert said["one"] != said["two"]
    # Which adapter a row has stands in a context variable, which a new thread doesn't inherit by itself.
    for name, wanted in ((BASE, base), ("one", said["one"])):
        with batch(Batch(adapters=(name,))):
            assert list(stream(model, prompt, GREEDY)) == wanted
    activate(model, [])
    assert list(stream(model, prompt, GREEDY)) == base


def test_batches_are_bounded_by_the_tokens_that_they_hold(tiny, monkeypatch):
    monkeypatch.setattr("deltaw.engine.generate.MAX_BATCH_TOKENS", 2 * (9 + GREEDY.max_new_tokens))
    model, prompts, told = tiny(), _prompts(9, 9, 9, 9, 60), []
    found = generate(model, prompts, GREEDY, progress=lambda *p: told.append(p))
    assert found == _alone(model, prompts)
    assert told == [(2, 5), (4, 5), (5, 5)]  # the long one is alone: more than the bound, but nobody's neighbour
