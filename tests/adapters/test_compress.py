"""Compressed adapters are the best of their rank, in files that we and PEFT read as the same thing."""

import dataclasses
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.adapters.compress import Ranks, compress, config_for
from deltaw.adapters.deltas import modules_of
from deltaw.adapters.inspection import inspect_adapter
from deltaw.adapters.peft_format import (
    Provenance,
    StoredAdapter,
    load_adapter,
    read_adapter,
    save_adapter,
    write_adapter,
)
from deltaw.config import LoraConfig
from deltaw.errors import UserError
from deltaw.nn.inject import activate, inject
from deltaw.nn.walk import adapted_layers, carriers

LINEAR = dict(r=6, lora_alpha=9, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)


def stored_adapter(model, folder, **config):
    """A random adapter, saved and read; trained biases and all moved."""
    torch.manual_seed(3)
    inject(model, LoraConfig(**(LINEAR | config)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    return read_adapter(save_adapter(model, folder))


def densely(stored, skeleton=None):
    return {
        m.name: m.delta.scaling * (m.delta.b_ENR.double() @ m.delta.a_ERK.double())
        for m in modules_of(stored, skeleton)
    }


def scalings(config, names):
    return {name: config.scaling_of(name) for name in names}


def written(result, folder):
    folder.mkdir()
    return read_adapter(write_adapter(result.adapter, folder))


@pytest.mark.parametrize("more", [{}, dict(use_rslora=True), dict(rank_pattern={"v_proj": 3}, alpha_pattern={"q": 2})])
def test_every_module_is_the_best_of_its_rank(tiny, tmp_path, more):
    if "alpha_pattern" in more:
        more = more | dict(alpha_pattern={"q_proj": 2.5, "layers.1.mlp.down_proj": 7})
    stored = stored_adapter(tiny(), tmp_path / "a", **more)
    result = compress(stored, Ranks(rank=4, pattern={"layers.1.self_attn.q_proj": 2, r"mlp\.\w+": 5}))
    again = written(result, tmp_path / "b")
    before, after = densely(stored), densely(again)
    assert scalings(again.config, before) == pytest.approx(scalings(stored.config, before), rel=1e-12)
    for module in result.modules:
        u, s, v = torch.linalg.svd(before[module.name][0])
        k = module.rank
        wanted = (u[:, :k] * s[:k]) @ v[:k]
        torch.testing.assert_close(after[module.name][0], wanted, atol=1e-6, rtol=1e-5)
        assert module.energy == pytest.approx(float(s[:k].square().sum() / s.square().sum()))
    ranks = {m.name: m.rank for m in result.modules}
    assert ranks["model.layers.1.self_attn.q_proj"] == 2 and ranks["model.layers.0.mlp.down_proj"] == 5
    assert ranks["model.layers.0.self_attn.q_proj"] == 4
    assert ranks["model.layers.0.self_attn.v_proj"] == (3 if "rank_pattern" in more else 4)
    assert result.parameters == sum(t.numel() for parts in again.factors.values() for t in parts.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_rank_is_the_identity_to_the_bit(tiny, tmp_path, dtype):
    stored = stored_adapter(tiny(), tmp_path / "a")
    factors = {m: {k: t.to(dtype) for k, t in parts.items()} for m, parts in stored.factors.items()}
    stored = dataclasses.replace(stored, factors=factors)
    again = written(compress(stored, Ranks(rank=99)), tmp_path / "b")
    for module, parts in factors.items():
        for name, tensor in parts.items():
            assert again.factors[module][name].dtype == dtype and torch.equal(again.factors[module][name], tensor)
    assert (again.config.r, again.config.lora_alpha) == (6, 9)
    assert not again.config.rank_pattern and not again.config.alpha_pattern


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 6), extra=st.integers(0, 6), seed=st.integers(0, 10**6))
def test_a_rank_that_holds_all_of_it_is_the_identity(rank, extra, seed):
    generator = torch.Generator().manual_seed(seed)
    b, mix, a = (torch.randn(s, generator=generator) for s in ((9, rank), (rank, rank + extra), (rank + extra, 8)))
    factors = {"x.q_proj": {"lora_A": a, "lora_B": b @ mix}}
    config = LoraConfig(r=rank + extra, lora_alpha=3, target_modules=["q_proj"])
    stored = StoredAdapter(None, config, factors, {}, Provenance(), 0)
    for ranks in (Ranks(rank=rank), Ranks(energy=1 - 1e-12)):
        result = compress(stored, ranks)
        assert result.modules[0].rank <= rank
        assert result.energy == pytest.approx(1)
        torch.testing.assert_close(
            densely(result.adapter)["x.q_proj"], densely(stored)["x.q_proj"], atol=1e-4, rtol=1e-4
        )


def test_energy_is_kept_in_every_module_and_config_says_the_ranks(tiny, tmp_path):
    stored = stored_adapter(tiny(), tmp_path / "a")
    energies = []
    for energy in (0.3, 0.6, 0.9, 1.0):
        result = compress(stored, Ranks(energy=energy))
        assert all(m.energy >= energy - 1e-9 for m in result.modules)
        energies.append(result.energy)
        for m in result.modules:
            assert result.adapter.config.rank_of(m.name) == m.rank
    assert energies == sorted(energies)


def test_provenance_and_all_else_come_along(tiny, tmp_path):
    model = tiny("qwen2")
    stored = stored_adapter(model, tmp_path / "a", bias="lora_only", modules_to_save=["norm"])
    stored = dataclasses.replace(stored, provenance=stored.provenance.after("compress --rank 4 of abc"))
    again = written(compress(stored, Ranks(rank=2)), tmp_path / "b")
    assert again.provenance.history == ("compress --rank 4 of abc",)
    assert again.provenance.config_sha256 != stored.provenance.config_sha256
    assert again.others.keys() == stored.others.keys() and len(again.others) > 3
    assert all(torch.equal(again.others[name], tensor) for name, tensor in stored.others.items())
    assert dict(again.keys) == dict(stored.keys)
    load_adapter(tiny("qwen2"), again)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_peft_and_we_read_it_alike(tiny, tmp_path, ids, architecture, use_dora):
    import peft

    targets = ["q_proj", "v_proj", "down_proj", "embed_tokens"] if architecture == "llama" else ["c_attn", "c_proj"]
    targets = [t for t in targets if not (use_dora and t == "embed_tokens")]
    stored = stored_adapter(tiny(architecture), tmp_path / "a", target_modules=targets, use_dora=use_dora)
    again = written(compress(stored, Ranks(energy=0.7)), tmp_path / "b")
    assert again.config.rank_pattern  # ranks differ
    assert {m: p.keys() for m, p in again.factors.items()} == {m: p.keys() for m, p in stored.factors.items()}
    if use_dora:  # rows keep their lengths, whatever their directions are
        assert all(
            torch.equal(parts["lora_magnitude_vector"], again.factors[m]["lora_magnitude_vector"])
            for m, parts in stored.factors.items()
        )
    ours = tiny(architecture)
    load_adapter(ours, again)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(tiny(architecture), str(tmp_path / "b"))
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-4)


def test_dora_at_full_energy_says_the_same(tiny, tmp_path, ids):
    stored = stored_adapter(tiny(), tmp_path / "a", use_dora=True)
    whole = dataclasses.replace(stored, factors={
        name: parts | {"lora_B": torch.cat([parts["lora_B"][:, :3], parts["lora_B"][:, :3]], 1)}
        for name, parts in stored.factors.items()
    })  # fmt: skip
    model = tiny()
    load_adapter(model, whole, "whole")
    load_adapter(model, written(compress(whole, Ranks(rank=3)), tmp_path / "b"), "cut")
    with torch.no_grad():
        cut = model(ids).logits
        activate(model, ["whole"])
        torch.testing.assert_close(cut, model(ids).logits, atol=1e-5, rtol=1e-4)


def test_experts_keep_one_rank_a_parameter(tiny, tmp_path):
    config = dict(
        target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], r=4,
        lora_alpha=6, init_lora_weights=False,
    )  # fmt: skip
    stored = stored_adapter(tiny("qwen3_moe"), tmp_path / "a", **config)
    with torch.device("meta"):
        skeleton = tiny("qwen3_moe")
    modules = {m.name: m for m in modules_of(stored, skeleton)}
    up = modules["model.layers.0.mlp.experts.gate_up_proj"]
    assert (up.kind, up.delta.num_experts, up.delta.rank) == ("parameter", 4, 4)
    assert {m.delta.num_experts for m in modules_of(stored)} == {1, 4}  # told by the config's rank alone
    with pytest.raises(UserError, match="stands in the base alone; give the base"):
        compress(stored, Ranks(rank=2))
    result = compress(stored, Ranks(rank=2, pattern={"down_proj": 3}), skeleton=skeleton)
    again = written(result, tmp_path / "b")
    before, after = densely(stored, skeleton), densely(again, skeleton)
    model = tiny("qwen3_moe")
    load_adapter(model, again)
    placed = {
        f"{name}.{parameter}": factors
        for name, carrier in carriers(model)
        if "experts" in name
        for parameter, factors in carrier.factors("default")
    }
    for m in result.modules:
        assert m.rank == (3 if m.name.endswith("down_proj") else 2)
        u, s, v = torch.linalg.svd(before[m.name], full_matrices=False)
        wanted = u[..., : m.rank] * s[:, None, : m.rank] @ v[:, : m.rank]
        torch.testing.assert_close(after[m.name], wanted, atol=1e-6, rtol=1e-4)
        if m.kind == "parameter":
            torch.testing.assert_close(placed[m.name].delta().double(), wanted, atol=1e-5, rtol=1e-4)


def test_starts_that_are_joined_are_cut_as_what_they_are(tiny, tmp_path):
    model = tiny()
    stored = stored_adapter(model, tmp_path / "a", init_lora_weights="pissa")  # saved at rank 2r
    deltas = {n: layer.adapter("default").delta() for n, layer in adapted_layers(model)}
    assert stored.config.r == 12 and stored.config.init_lora_weights is True
    for name, delta in densely(stored).items():
        torch.testing.assert_close(delta[0].float(), deltas[name].detach(), atol=1e-5, rtol=1e-4)
    again = written(compress(stored, Ranks(energy=0.999999)), tmp_path / "b")
    for name, delta in densely(again).items():
        torch.testing.assert_close(delta[0].float(), deltas[name].detach(), atol=1e-2, rtol=1e-2)


def test_what_never_moved_can_still_be_trained(tiny, tmp_path):
    model = tiny()
    inject(model, LoraConfig(r=4, target_modules=["q_proj"]))
    stored = read_adapter(save_adapter(model, tmp_path / "a"))
    assert inspect_adapter(stored).totals["not_moved"] == list(stored.factors)
    again = compress(stored, Ranks(energy=0.9)).adapter
    for name, parts in again.factors.items():
        assert torch.equal(parts["lora_A"], stored.factors[name]["lora_A"][:1]) and not parts["lora_B"].any()


def test_names_that_end_alike_keep_their_ranks():
    wanted = {"q": (4, 2.0), "a.q": (2, 2.0), "b.a.q": (4, 2.0), "b.v": (3, 0.5), "c.v": (4, 2.0)}
    config = config_for(LoraConfig(target_modules=["q", "v"]), wanted)
    assert {name: (config.rank_of(name), config.scaling_of(name)) for name in wanted} == wanted
    plain = config_for(LoraConfig(target_modules=["q", "v"]), {"x.q": (4, 0.5), "y.q": (4, 0.5), "x.v": (2, 0.5)})
    assert (plain.r, plain.lora_alpha, plain.rank_pattern, plain.alpha_pattern) == (4, 2, {"x.v": 2}, {"x.v": 1})


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({}, "either a rank or an energy"),
        (dict(rank=2, energy=0.5), "either a rank or an energy"),
        (dict(rank=0), "expected 1 or more"),
        (dict(energy=1.5), "over 0 and up to 1"),
        (dict(energy=float("nan")), "over 0 and up to 1"),
        (dict(rank=2, pattern={"nope": 3}), "names no module"),
        (dict(rank=2, pattern={"q_proj": 0}), "ranks from 1"),
        (dict(rank=2, pattern={"(": 1}), "not a regular expression"),
    ],
)
def test_wishes_that_are_none_are_refused(tiny, tmp_path, given_, message):
    stored = stored_adapter(tiny(), tmp_path / "a")
    with pytest.raises(UserError, match=message):
        compress(stored, Ranks(**given_))


def test_adapters_that_cannot_be_cut_are_refused_by_name(tiny, tmp_path):
    stored = stored_adapter(tiny(), tmp_path / "a")
    name = next(iter(stored.factors))
    parts = stored.factors[name]

    def changed(**other):
        return dataclasses.replace(stored, factors=stored.factors | {name: parts | other})

    with pytest.raises(UserError, match="no numbers"):
        compress(changed(lora_A=parts["lora_A"] / 0), Ranks(rank=2))
    with pytest.raises(UserError, match=r"expected \(r, inputs\)"):
        compress(changed(lora_A=parts["lora_A"][:3]), Ranks(rank=2))
    with pytest.raises(UserError, match="rank 3, but its config says 6"):
        compress(changed(lora_A=parts["lora_A"][:3], lora_B=parts["lora_B"][:, :3]), Ranks(rank=2))
    missing = dataclasses.replace(stored, factors={name: {"lora_A": parts["lora_A"]}})
    with pytest.raises(UserError, match="lora_B missing"):
        compress(missing, Ranks(rank=2))
    other = dataclasses.replace(stored, config=dataclasses.replace(stored.config, init_lora_weights="pissa"))
    with pytest.raises(UserError, match="start was taken off"):
        compress(other, Ranks(rank=2))


def test_single_experts_of_old_files_keep_one_rank_for_fusing(tmp_path):
    generator = torch.Generator().manual_seed(0)
    names = [f"m.layers.{i}.mlp.experts.{e}.{p}" for i in range(2) for e in range(2) for p in ("w1", "w2", "w3")]
    factors = {
        name: {"lora_A": torch.randn(4, 6, generator=generator), "lora_B": torch.randn(5, 4, generator=generator)}
        for name in names
    }
    config = LoraConfig(r=4, target_modules=["w1", "w2", "w3"])
    result = compress(StoredAdapter(tmp_path, config, factors, {}, Provenance(), 0), Ranks(energy=0.7))
    ranks = {m.name: m.rank for m in result.modules}
    assert len({ranks[n] for n in names if n.endswith("w2")}) == 1
    assert len({ranks[n] for n in names if not n.endswith("w2")}) == 1
    assert all(m.energy >= 0.7 for m in result.modules)
