"""Starts: step 0 is the base, nothing else changes it, and A and B are PEFT's."""

import inspect

import peft
import peft.tuners.lora.layer
import peft.utils.loftq_utils as peft_loftq
import pytest
import torch

from deltaw.config import LoraConfig
from deltaw.errors import UserError
from deltaw.nn.inject import inject
from deltaw.nn.starts import Site, _quantised, loftq, olora, orthogonal, pissa, start_for
from deltaw.nn.walk import adapted_layers
from deltaw.ops.frozen import DenseWeight
from deltaw.ops.nf4 import quantize
from deltaw.ops.quantized import QuantizedWeight
from deltaw.settings import LoftQConfig

STARTS = [True, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "loftq", "eva"]
SUBTRACTED = ["pissa", "pissa_niter_4", "olora", "loftq"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to", "ignore:`init_lora_weights` is 'eva' but `eva_config`"
)


def _config(start, **more):
    return dict(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=start) | more


def _adapted(model, start, **more):
    inject(model, LoraConfig(**_config(start, **more)))
    return model


def _site(*shape, rank=4, scaling=1.5, seed=0):
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return Site(name="layer", weight=DenseWeight(w), rank=rank, scaling=scaling)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_step_0_is_the_base(tiny, architecture, ids, start, dora):
    base, model = tiny(architecture), tiny(architecture)
    before = {n: p.clone() for n, p in model.named_parameters()}
    _adapted(model, start, use_dora=dora)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, base(ids).logits, atol=2e-5, rtol=1e-4)
    after = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("start", STARTS)
def test_a_seed_gives_the_same_factors_again(tiny, start):
    models = []
    for seed in (1, 1, 2):
        model = tiny()
        torch.manual_seed(seed)
        models.append(dict(_adapted(model, start).named_parameters()))
    assert all(torch.equal(p, models[1][n]) for n, p in models[0].items())
    is_exact = start in ("pissa", "olora", "loftq")
    assert is_exact == all(torch.equal(p, models[2][n]) for n, p in models[0].items())


@pytest.mark.parametrize("start", STARTS)
def test_only_starts_that_are_not_zero_keep_a_copy(tiny, start):
    model = _adapted(tiny(), start)
    for _, layer in adapted_layers(model):
        part = layer.adapter("default")
        product = part.lora_B @ part.lora_A
        assert part.delta().abs().max() < 1e-6
        if start in SUBTRACTED:
            assert torch.equal(part.start_A, part.lora_A) and torch.equal(part.start_B, part.lora_B)
            assert part.start_A.data_ptr() != part.lora_A.data_ptr() and product.abs().max() > 1e-3
        else:
            assert part.start is None and product.abs().max() < 1e-6


EXTRA = {
    "plain": {},
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "patterns": dict(rank_pattern={"up_proj": 2}, alpha_pattern={"q_proj": 11}),
}


@pytest.mark.parametrize("extra", EXTRA)
@pytest.mark.parametrize("start", ["orthogonal", "pissa", "pissa_niter_4", "olora"])
def test_a_trained_adapter_is_peft_s_beside_its_changed_base(tiny, ids, start, extra):
    config = _config(start, **EXTRA[extra])
    theirs = peft.get_peft_model(tiny(), peft.LoraConfig(**config))
    model = _adapted(tiny(), start, **EXTRA[extra])
    generator = torch.Generator().manual_seed(5)
    modules = dict(theirs.base_model.model.named_modules())
    for name, layer in adapted_layers(model):
        part, twin = layer.adapter("default"), modules[name]
        a, b = twin.lora_A["default"].weight.data, twin.lora_B["default"].weight.data
        assert part.scaling == twin.scaling["default"] and part.lora_A.shape == a.shape
        torch.testing.assert_close(layer.weight - twin.base_layer.weight, part.scaling * b @ a, atol=1e-5, rtol=1e-4)
        with torch.no_grad():  # both set out from PEFT's factors, which may have other signs, and go the same way
            if start in SUBTRACTED:
                part.start_A.copy_(a)
                part.start_B.copy_(b)
            a += 0.1 * torch.randn(a.shape, generator=generator)
            b += 0.1 * torch.randn(b.shape, generator=generator)
            part.lora_A.copy_(a)
            part.lora_B.copy_(b)
    with torch.no_grad():
        logits = model(ids).logits
        assert (logits - tiny()(ids).logits).abs().max() > 0.01
        torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)


PEFTS = {
    "gaussian": lambda layer: layer.reset_lora_parameters("default", "gaussian"),
    True: lambda layer: layer.reset_lora_parameters("default", True),
    "orthogonal": lambda layer: layer.orthogonal_init("default"),
    "pissa": lambda layer: layer.pissa_init("default", "pissa"),
    "pissa_niter_4": lambda layer: layer.pissa_init("default", "pissa_niter_4"),
    "olora": lambda layer: layer.olora_init("default"),
}


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (8, 8)], ids=str)
@pytest.mark.parametrize("start", PEFTS)
def test_factors_equal_peft_s_for_a_seed(start, shape):
    site = _site(*shape)
    linear = torch.nn.Linear(*shape[::-1])
    linear.weight.data.copy_(site.weight.weight)
    layer = peft.get_peft_model(
        torch.nn.Sequential(linear), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"])
    ).base_model.model[0]
    torch.manual_seed(7)
    PEFTS[start](layer)
    torch.manual_seed(7)
    made = start_for(LoraConfig(r=4, lora_alpha=6, init_lora_weights=start))(site)
    torch.testing.assert_close(made.a_RK, layer.lora_A["default"].weight.data, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(made.b_NR, layer.lora_B["default"].weight.data, atol=1e-6, rtol=1e-5)


def _peft_s_loftq():
    """PEFT's LoftQ insists on a GPU; this is its own function, told to compute here."""
    scope = dict(vars(peft_loftq))
    exec(inspect.getsource(peft_loftq.loftq_init).replace('"cuda"', '"cpu"'), scope)
    return scope["loftq_init"]


@pytest.mark.parametrize("shape", [(48, 64), (64, 40), (33, 50)], ids=str)
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_equals_peft_s(bits, rounds, shape):
    site = _site(*shape)
    made = loftq(site, bits=bits, rounds=rounds)
    _, a, b = _peft_s_loftq()(site.weight.weight, num_bits=bits, reduced_rank=4, num_iter=rounds)
    assert (made.a_RK.shape, made.b_NR.shape) == (a.shape, b.shape)
    product = b @ a
    torch.testing.assert_close(made.b_NR @ made.a_RK, product, atol=1e-3 * product.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_loftq_makes_good_part_of_the_loss_of_quantising(bits):
    site = _site(64, 64, rank=16)
    w = site.weight.weight
    made = loftq(site, bits=bits)
    lost = (w - _quantised(w, bits)).norm()
    assert 0 < (w - _quantised(w, bits) - made.b_NR @ made.a_RK).norm() < 0.8 * lost
    zero = Site(name="zero", weight=DenseWeight(torch.zeros(64, 64)), rank=2, scaling=1.0)
    assert all(not factor.any() for factor in loftq(zero, bits=bits)[:2])


def test_pissa_is_the_best_approximation_of_the_weight():
    site = _site(30, 20)
    w = site.weight.weight
    exact, fast = pissa(site), pissa(site, iterations=20)
    error = torch.linalg.svdvals(w)[4:].square().sum().sqrt()
    for made in (exact, fast):
        torch.testing.assert_close((w - site.scaling * made.b_NR @ made.a_RK).norm(), error, atol=1e-4, rtol=1e-4)


def test_orthogonal_has_no_product_and_needs_an_even_rank():
    made = orthogonal(_site(30, 20))
    assert (made.b_NR @ made.a_RK).abs().max() < 1e-7 < made.a_RK.abs().min()
    with pytest.raises(UserError, match="even rank, and layer has 3"):
        orthogonal(_site(30, 20, rank=3))


@pytest.mark.parametrize("start", [pissa, olora, loftq])
def test_weights_that_have_no_such_factors(start):
    with pytest.raises(UserError, match="layer is 30 × 6 and has no rank 8; give r or rank_pattern 6 at most"):
        start(_site(30, 6, rank=8))
    site = _site(8, 6)
    site.weight.weight[2, 3] = float("inf")
    with pytest.raises(UserError, match="infinities"):
        start(site)


def test_settings_that_a_start_can_t_work_with():
    with pytest.raises(UserError, match="positive lora_alpha"):
        pissa(_site(8, 6, scaling=0.0))

    w = torch.randn(8, 64)
    quantised = QuantizedWeight(quantize(w))
    for given in (dict(bits=8), dict(rounds=2)):
        with pytest.raises(UserError, match=r"layer is quantised already, and stays as it is.*expected 4 and 1"):
            loftq(Site(name="layer", weight=quantised, rank=2, scaling=1.0, original=lambda: w), **given)
    with pytest.raises(UserError, match="positive lora_alpha"):
        loftq(Site(name="layer", weight=quantised, rank=2, scaling=0.0, original=lambda: w))


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)], ids=str)
@pytest.mark.parametrize("scaling", [0.25, 8.0])
def test_loftq_on_a_quantised_base_is_the_best_approximation_of_what_was_lost(scaling, shape):
    w = torch.randn(*shape)
    quantised = QuantizedWeight(quantize(w, double=True))
    made = loftq(Site(name="x", weight=quantised, rank=8, scaling=scaling, original=w.bfloat16))
    lost = w.bfloat16().float() - quantised.dequantize()
    left = torch.linalg.svdvals(lost)[8:].square().sum().sqrt()
    assert not made.is_subtracted and made.a_RK.shape == (8, shape[1]) and made.b_NR.shape == (shape[0], 8)
    torch.testing.assert_close(made.a_RK.norm(dim=1), made.b_NR.norm(dim=0))  # shared out evenly
    zero = QuantizedWeight(quantize(torch.zeros(64, 64)))
    none = loftq(Site(name="x", weight=zero, rank=2, scaling=scaling, original=lambda: torch.zeros(64, 64)))
    assert not none.a_RK.any() and not none.b_NR.any()
    torch.testing.assert_close((lost - scaling * made.b_NR @ made.a_RK).norm(), left, rtol=1e-4, atol=0)


def test_a_start_that_fails_leaves_the_model_as_it_was(tiny):
    model = tiny()
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(UserError, match="has no rank 33"):
        _adapted(model, "pissa", r=33)
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("start", STARTS)
def test_embeddings_start_with_a_zero_and_b_normal(tiny, start):
    model = _adapted(tiny(), start, target_modules=["embed_tokens"])
    ((_, layer),) = adapted_layers(model)
    part = layer.adapter("default")
    assert not part.lora_A.any() and 0.8 < part.lora_B.std() < 1.2 and part.start is None


def test_loftq_s_settings_reach_it():
    config = LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=8, loftq_iter=3))
    assert start_for(config).keywords == {"bits": 8, "rounds": 3}


@pytest.mark.parametrize("start", STARTS)
def test_the_first_step_trains(tiny, ids, start):
    model = _adapted(tiny(), start)
    model(ids, labels=ids).loss.backward()
    parts = [layer.adapter("default") for _, layer in adapted_layers(model)]
    assert all(part.lora_B.grad.abs().max() > 0 for part in parts)
    assert start in (True, "gaussian", "eva") or all(part.lora_A.grad.abs().max() > 0 for part in parts)


@pytest.mark.parametrize("start", SUBTRACTED)
def test_step_0_over_a_bfloat16_base(tiny, ids, start):
    base = tiny(dtype=torch.bfloat16)
    model = _adapted(tiny(dtype=torch.bfloat16), start)
    with torch.no_grad():
        expected = base(ids).logits
        assert (model(ids).logits - expected).abs().max() < 0.02 * expected.abs().max()
