"""Adapters from before experts were fused give each expert's layer its own ΔW, in the fused weights."""

import json

import pytest
import torch
from safetensors.torch import save_file

from deltaw import UserError
from deltaw.adapters.peft_format import load_adapter, read_adapter, save_adapter
from deltaw.config import CONFIG_NAME
from deltaw.nn.state import state_of

RANK, SCALING, EXPERTS, HIDDEN, INNER = 4, 1.5, 4, 32, 16
NAMINGS = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2"), "qwen": ("mlp", "gate_proj", "up_proj", "down_proj")}


@pytest.fixture(params=NAMINGS)
def naming(request):
    return NAMINGS[request.param]


def _write(folder, naming, *, without=(), **fields):
    """An adapter on router, q_proj and experts, but for what is left ``without``; its factors by module."""
    block, gate, up, down = naming
    generator = torch.Generator().manual_seed(0)
    sizes = {gate: (HIDDEN, INNER), up: (HIDDEN, INNER), down: (INNER, HIDDEN)}
    layers = [f"model.layers.{i}" for i in range(2)]
    shapes = {f"{n}.self_attn.q_proj": (HIDDEN, HIDDEN) for n in layers}
    shapes |= {f"{n}.{block}.gate": (HIDDEN, EXPERTS) for n in layers}
    shapes |= {f"{n}.{block}.experts.{e}.{k}": s for n in layers for e in range(EXPERTS) for k, s in sizes.items()}
    shapes = {n: s for n, s in shapes.items() if not n.endswith(tuple(without))} if without else shapes
    factors = {
        name: (torch.randn(RANK, k, generator=generator) * 0.3, torch.randn(n, RANK, generator=generator) * 0.3)
        for name, (k, n) in shapes.items()
    }
    tensors = {f"base_model.model.{n}.lora_A.weight": a for n, (a, _) in factors.items()}
    tensors |= {f"base_model.model.{n}.lora_B.weight": b for n, (_, b) in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = dict(peft_type="LORA", r=RANK, lora_alpha=6, target_modules=["q_proj", "gate", gate, up, down]) | fields
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    return factors


def _by_hand(model, factors, naming, scaling=SCALING):
    """The model with s·B·A added to each expert's own slice."""
    block, gate, up, _ = naming
    with torch.no_grad():
        for name, (a, b) in factors.items():
            owner, _, rest = name.replace(f".{block}.", ".mlp.").partition(".experts.")
            expert, _, layer = rest.partition(".")
            delta = scaling * (b @ a)
            if not rest:
                model.get_submodule(owner).weight.add_(delta)
                continue
            experts = model.get_submodule(f"{owner}.experts")
            rows = {gate: slice(0, INNER), up: slice(INNER, None)}.get(layer)
            (experts.down_proj if rows is None else experts.gate_up_proj)[int(expert)][rows or slice(None)].add_(delta)
    return model


@pytest.mark.parametrize("fields", [{}, dict(use_rslora=True), dict(lora_dropout=0.05)])
def test_each_expert_gets_its_own_delta(tiny, ids, tmp_path, naming, fields):
    factors = _write(tmp_path, naming, **fields)
    scaling = 6 / RANK**0.5 if "use_rslora" in fields else SCALING
    wanted = _by_hand(tiny("qwen3_moe"), factors, naming, scaling)(ids).logits
    model = tiny("qwen3_moe")
    base = model(ids).logits
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - base).abs().max() > 1e-2

    again = tiny("qwen3_moe")
    load_adapter(again, save_adapter(model, tmp_path / "saved"))
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert read_adapter(tmp_path / "saved").config.rank_pattern == {
        "experts.gate_up_proj": 2 * RANK,
        "experts.down_proj": RANK,
    }


@pytest.mark.parametrize("part", [("down_proj",), ("gate_proj", "up_proj")])
def test_one_of_the_two_parameters(tiny, ids, tmp_path, part):
    factors = _write(tmp_path, NAMINGS["qwen"], without=part)
    model = tiny("qwen3_moe")
    load_adapter(model, tmp_path)
    wanted = _by_hand(tiny("qwen3_moe"), factors, NAMINGS["qwen"])(ids).logits
    torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("without", "fields", "message"),
    [
        (("up_proj",), {}, r"layers.0.mlp.experts: not every expert's gate and up has an adapter"),
        (("layers.1.mlp.experts.2.down_proj",), {}, "not every expert's down has an adapter"),
        ((), dict(rank_pattern={"up_proj": 2}), "experts.gate_up_proj: its experts differ in .* rank or scaling"),
        ((), dict(alpha_pattern={"layers.1.mlp.experts.0.up_proj": 2}), "its experts differ in"),
        ((), dict(alpha_pattern={r".*layers\.1\.mlp\.experts.*": 2}), "another rank or scaling than other layers'"),
        ((), dict(r=8), "its experts differ in shape"),
    ],
)
def test_experts_that_can_not_be_fused_are_named(tiny, tmp_path, without, fields, message):
    _write(tmp_path, NAMINGS["qwen"], without=without, **fields)
    model = tiny("qwen3_moe")
    with pytest.raises(UserError, match=message):
        load_adapter(model, tmp_path)
    assert not state_of(model).configs


def test_to_train_on_it_must_be_without_dropout(tiny, tmp_path):
    _write(tmp_path, NAMINGS["qwen"], lora_dropout=0.05)
    with pytest.raises(UserError, match=r"lora_dropout=0.05 does not go with target_parameters; set it to 0"):
        load_adapter(tiny("qwen3_moe"), tmp_path, trainable=True)
    _write(tmp_path, NAMINGS["qwen"])
    load_adapter(tiny("qwen3_moe"), tmp_path, trainable=True)
