"""DoRA's norm: its closed form, what moves, and a cache that sees every change."""

import pytest
import torch

import deltaw
from deltaw.nn.batch import Batch, batch
from deltaw.nn.dora import NormCache, adapted_norm, row_norms_squared
from deltaw.nn.inject import inject
from deltaw.nn.walk import adapted_layers
from deltaw.ops.frozen import DenseWeight
from deltaw.train.optim import AdamW


def _rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def layer(tiny):
    model = tiny()
    inject(model, deltaw.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, init_lora_weights=False))
    return next(layer for _, layer in adapted_layers(model))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_norm_is_that_of_the_whole_weight(transposed):
    w, a, b = _rand(6, 5), _rand(3, 5, seed=1), _rand(6, 3, seed=2)
    weight = DenseWeight(w.T.contiguous() if transposed else w, transposed=transposed)
    norm = adapted_norm(weight, row_norms_squared(weight), a, b, 0.7)
    torch.testing.assert_close(norm, (w + 0.7 * b @ a).norm(dim=1))


def test_the_norm_is_detached_and_the_magnitude_moves(tiny, ids):
    model = tiny()
    inject(model, deltaw.LoraConfig(r=4, target_modules="all-linear", use_dora=True))
    parts = [layer.adapter("default") for _, layer in adapted_layers(model)]
    before = [part.lora_magnitude_vector.detach().clone() for part in parts]
    assert all(not layer.column_scale("default").grad_fn.next_functions[1:][0][0] for _, layer in adapted_layers(model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # with B zero at first, A only moves in the second step
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    for part, was in zip(parts, before, strict=True):
        assert not torch.equal(part.lora_magnitude_vector, was)
        assert part.lora_B.abs().max() > 0


CHANGES = {
    "A in place": lambda layer: layer.adapter("default").lora_A.mul_(2),
    "B in place": lambda layer: layer.adapter("default").lora_B.mul_(2),
    "weight in place": lambda layer: layer.weight.mul_(2),
    "one entry": lambda layer: layer.adapter("default").lora_B[0].fill_(3),
    "load_state_dict": lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}),
    "new data": lambda layer: setattr(layer.adapter("default").lora_A, "data", layer.adapter("default").lora_A * 2),
    "new parameter": lambda layer: setattr(
        layer.adapter("default"), "lora_A", torch.nn.Parameter(2 * layer.adapter("default").lora_A)
    ),
    "scaling": lambda layer: setattr(layer.adapter("default"), "scaling", 3.0),
    "dtype": lambda layer: layer.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_cache_sees_every_change(layer, change):
    layer.adapters.requires_grad_(change == "new parameter")  # else nothing is kept

    def fresh():
        adapter = layer.adapter("default")
        norm = adapted_norm(
            layer.storage, row_norms_squared(layer.storage), adapter.lora_A, adapter.lora_B, adapter.scaling
        )
        return adapter.lora_magnitude_vector / norm

    before = layer.column_scale("default")
    assert torch.equal(before, fresh())
    with torch.no_grad():
        CHANGES[change](layer)
    after = layer.column_scale("default")
    assert torch.equal(after, fresh())
    assert after.dtype != before.dtype or not torch.equal(after, before)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    ],
    ids=["sgd", "foreach", "fused"],
)
def test_the_cache_sees_optimisers(layer, make):
    x = _rand(3, 32)
    optimizer = make([*layer.adapters.parameters()])
    layer(x).square().sum().backward()
    before = layer.column_scale("default").detach().clone()
    optimizer.step()
    adapter = layer.adapter("default")
    norms = row_norms_squared(layer.storage)
    norm = adapted_norm(layer.storage, norms, adapter.lora_A, adapter.lora_B, adapter.scaling)
    assert torch.equal(layer.column_scale("default"), adapter.lora_magnitude_vector / norm)
    assert not torch.equal(layer.column_scale("default"), before)


def test_nothing_is_computed_twice_while_nothing_changes(monkeypatch):
    weight, w, a, b = DenseWeight(_rand(6, 5)), _rand(6, 5), _rand(3, 5), _rand(6, 3)
    cache = NormCache()
    first = cache.norm(weight, w, a, b, 1.0)
    monkeypatch.setattr("deltaw.nn.dora.adapted_norm", None)
    monkeypatch.setattr("deltaw.nn.dora.row_norms_squared", None)
    assert cache.norm(weight, w, a, b, 1.0) is first


def test_where_changes_are_counted_training_computes_the_norm_once_a_step(layer, monkeypatch):
    adapter, computed = layer.adapter("default"), []
    monkeypatch.setattr("deltaw.nn.dora.adapted_norm", lambda *given: computed.append(1) or adapted_norm(*given))
    optimizer = AdamW({"a.lora_A": adapter.lora_A, "a.lora_B": adapter.lora_B}, weight_decay=0.0)
    for step in range(2):
        for _ in range(3):
            with batch(Batch(counts_changes=True)):
                layer(_rand(3, 32)).square().sum().backward()
        assert len(computed) == step + 1
        optimizer.step(0.1)
    layer(_rand(3, 32))
    layer(_rand(3, 32))
    assert len(computed) == 4  # nobody counts here


def test_training_in_between_leaves_no_old_norm_behind(layer):
    x, parts = _rand(3, 32), [*layer.adapters.parameters()]
    layer.adapters.requires_grad_(False)
    before = layer(x)
    layer.adapters.requires_grad_(True)
    layer(x).square().sum().backward()
    torch.optim.AdamW(parts, lr=0.1, fused=True).step()  # counted nowhere
    layer.adapters.requires_grad_(False)
    after = layer(x)
    layer.adapter("default").norms = NormCache()
    assert torch.equal(layer(x), after) and not torch.equal(after, before)


def test_a_norm_first_taken_in_inference_mode_can_be_trained_with(layer):
    with torch.inference_mode():
        layer(_rand(3, 32))
    layer(_rand(3, 32)).sum().backward()
    assert layer.adapter("default").lora_magnitude_vector.grad.abs().max() > 0


def test_rows_without_a_weight_stay_finite(tiny, ids):
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[90:] = 0  # as where a vocabulary is padded
    base = model(ids).logits
    inject(model, deltaw.LoraConfig(target_modules=["lm_head"], use_dora=True))
    assert torch.equal(model(ids).logits, base)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_the_bias_is_not_scaled(tiny, ids):
    model = tiny("qwen2")
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias)
    inject(model, deltaw.LoraConfig(target_modules=["q_proj"], use_dora=True))
    layer = next(layer for _, layer in adapted_layers(model))
    x = _rand(2, 32)
    with torch.no_grad():
        layer.adapter("default").lora_magnitude_vector.mul_(2)
    torch.testing.assert_close(layer(x) - layer.bias, 2 * (layer.base_layer(x) - layer.bias))
