"""The gate lets rounding through and nothing else, and says what it saw."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deltaw import LoraConfig
from deltaw.adapters import parity
from deltaw.adapters.merge import merge, unmerge
from deltaw.adapters.parity import CAST, EXACT, LOSSY, parity_of, reference_logits, sampled_logits, window_logits
from deltaw.errors import UserError
from deltaw.nn.inject import activate, inject
from deltaw.nn.load import load_tokenizer

IDS = torch.randint(3, 97, (2 * parity.WINDOW + 5,), generator=torch.Generator().manual_seed(0))


def _adapted(model, scale=1.0):
    torch.manual_seed(1)
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= scale
    return model


def test_figures_against_their_definition():
    torch.manual_seed(0)
    p_TV, q_TV = torch.randn(40, 11), torch.randn(40, 11)
    found = parity_of(p_TV, q_TV.split(7), dtype=torch.bfloat16)
    kl_T = nn.functional.kl_div(q_TV.log_softmax(-1), p_TV.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert found.mean_kl == pytest.approx(kl_T.mean().item(), rel=1e-4)
    assert found.max_kl == pytest.approx(kl_T.max().item(), rel=1e-4)
    assert found.max_logit_difference == pytest.approx((p_TV - q_TV).abs().max().item())
    assert found.equal_greedy == (p_TV.argmax(-1) == q_TV.argmax(-1)).double().mean().item()
    assert (found.num_tokens, found.dtype) == (40, "bfloat16")
    assert found.text_sha256 == parity.sha256_of_text(parity.reference_text())


@given(seed=st.integers(0, 999), rows=st.integers(1, 70), pieces=st.integers(1, 70))
@settings(max_examples=30, deadline=None)
def test_the_same_is_the_same_however_it_comes(seed, rows, pieces):
    logits_TV = torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed))
    logits_TV[:, 2] = -torch.inf  # a token that a model excludes
    found = parity_of(logits_TV, logits_TV.clone().split(pieces))
    assert (found.mean_kl, found.max_kl, found.max_logit_difference, found.equal_greedy) == (0, 0, 0, 1)
    assert EXACT.violations(found) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_passes_no_gate(bad):
    p_TV = torch.randn(9, 5)
    q_TV = p_TV.clone()
    q_TV[3, 1] = bad
    found = parity_of(p_TV, q_TV)
    assert LOSSY.violations(found)
    with pytest.raises(UserError, match="--allow-loss"):
        parity.require(found, LOSSY, what="merge")
    json.dumps(parity.report(found, LOSSY), allow_nan=False)


def test_another_vocabulary():
    with pytest.raises(UserError, match="5 logits a token and the result 6"):
        parity_of(torch.zeros(3, 5), torch.zeros(3, 6))


def test_models_are_read_window_by_window_and_left_as_they_were(tiny):
    model = tiny("llama").train()
    pieces = list(window_logits(model, IDS))
    assert [len(piece) for piece in pieces] == [parity.WINDOW, parity.WINDOW, 5]
    assert model.training
    assert not any(piece.requires_grad for piece in pieces)
    with torch.no_grad():
        alone = model.eval()(input_ids=IDS[parity.WINDOW : 2 * parity.WINDOW][None]).logits[0]
    assert torch.equal(pieces[1], alone)
    assert torch.equal(reference_logits(model, IDS), torch.cat(pieces))
    whole = nn.functional.cross_entropy(pieces[0][:-1], IDS[1 : parity.WINDOW])
    assert parity.text_loss(pieces[0], IDS[: parity.WINDOW]) == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_a_merge_passes_and_a_lost_or_doubled_adapter_does_not(tiny, dtype, scale):
    model = _adapted(tiny("llama", dtype=dtype), scale)
    source_TV = reference_logits(model, IDS)
    activate(model, [])
    base_TS, base_TV = sampled_logits(model, IDS), reference_logits(model, IDS)
    activate(model, ["default"])
    merge(model)
    found = parity_of(source_TV, window_logits(model, IDS), base_TS=base_TS, dtype=dtype)
    tolerance = parity.tolerance_for(dtype)
    assert tolerance is (EXACT if dtype == torch.float32 else CAST)
    assert parity.require(found, tolerance, what="merge")
    unmerge(model)
    lost = parity_of(source_TV, base_TV, base_TS=base_TS)
    assert lost.kept_effect == pytest.approx(0, abs=1e-6)
    doubled = parity_of(source_TV, 2 * source_TV - base_TV, base_TS=base_TS)
    assert doubled.kept_effect == pytest.approx(2, abs=1e-2)
    for wrong in (lost, doubled):
        assert any("effect" in line for line in tolerance.violations(wrong))


def test_what_is_mere_rounding_is_no_effect_that_could_get_lost():
    """Parts of a blend may cancel: what is left of them is another rounding in the source and in the result."""
    base_TV = torch.randn(40, 11)
    source_TV, result_TV = base_TV * (1 + 1e-6), base_TV * (1 - 1e-6)
    found = parity_of(source_TV, result_TV, base_TS=base_TV)
    assert found.kept_effect is None and "effect" not in str(found)
    assert not EXACT.violations(found)
    assert parity_of(base_TV * 1.001, result_TV, base_TS=base_TV).kept_effect == pytest.approx(0, abs=0.01)


def test_the_refusal_says_what_was_seen_what_was_tolerated_and_what_to_do():
    found = parity_of(torch.randn(40, 11), torch.randn(40, 11))
    with pytest.raises(UserError) as caught:
        parity.require(found, EXACT, what="merge", flag="--allow-loss")
    message = str(caught.value)
    assert f"mean KL {found.mean_kl:.2g} (tolerated: 1e-06)" in message
    assert "equal greedy tokens (tolerated: 99.0 %)" in message
    assert "--allow-loss" in message
    assert "\n" not in message
    assert parity.require(found, EXACT, what="merge", allow=True) is False


def test_the_file_beside_a_result(tmp_path):
    found = parity_of(torch.zeros(3, 5), torch.zeros(3, 5))
    path = parity.write_parity(tmp_path, found, EXACT, step="merge")
    report = json.loads(path.read_text())
    assert (report["step"], report["passed"]) == ("merge", True)
    assert report["parity"]["num_tokens"] == 3
    assert report["tolerance"]["mean_kl"] == EXACT.mean_kl
    assert [p.name for p in tmp_path.iterdir()] == ["parity.json"]


@pytest.mark.real
def test_text_in_windows_that_begin_as_texts_do(real_base):
    tokenizer, _ = load_tokenizer("smollm2-135m")
    ids_T = parity.reference_ids(tokenizer, 300)
    assert ids_T.shape == (300,)
    assert tokenizer.decode(ids_T[:8]).startswith("The ferry left the island")
    assert len(parity.reference_ids(tokenizer)) == parity.NUM_TOKENS
    everything = parity.reference_ids(tokenizer, 10**6)
    assert parity.NUM_TOKENS < len(everything) < 10**4

    def with_bos(text, add_special_tokens=True):
        body = tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": [7, *body, 8] if add_special_tokens else body}

    ids_T = parity.reference_ids(with_bos, 300)
    assert (ids_T[:: parity.WINDOW] == 7).all()
    assert (ids_T == 7).sum() == len(ids_T[:: parity.WINDOW])
    body = [i for window in ids_T.split(parity.WINDOW) for i in window[1:].tolist()]
    assert body == everything[: len(body)].tolist()
    with pytest.raises(UserError, match="too few"):
        parity.reference_ids(tokenizer, 1)


def test_the_text_is_varied_enough():
    text = parity.reference_text()
    assert len(text) > 4000
    assert all(part in text for part in ("def median", "SELECT", '{"order"', "fährt", "voir la mer"))
