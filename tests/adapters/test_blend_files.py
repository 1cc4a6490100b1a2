"""Blending files gives what blending in a model gives, and says how far that is from the weighted sum."""

import dataclasses

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw import LoraConfig
from deltaw.adapters.blend import METHODS, Part, Recipe, blend, blend_parts
from deltaw.adapters.blend_files import blend_stored, norm_of_sum
from deltaw.adapters.merge import merge, unmerge
from deltaw.adapters.peft_format import adapter_tensors, load_adapter, read_adapter, save_adapter, write_adapter
from deltaw.errors import UserError
from deltaw.nn.inject import activate, inject
from deltaw.nn.lowrank import LowRank
from deltaw.nn.walk import adapted_layers


def _save(model, folder, *, seed, **config):
    torch.manual_seed(seed)
    given = dict(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False) | config
    inject(model, LoraConfig(**given), folder.name)
    for layer in dict(adapted_layers(model)).values():
        if folder.name in layer.adapters:
            layer.adapter(folder.name).lora_B.data.normal_()
    return read_adapter(save_adapter(model, folder, folder.name))


def _recipe(method, **given):
    prunes = not method.startswith(("linear", "cat")) and method != "svd"
    return Recipe(method=method, density=0.6 if prunes else None, **given)


@pytest.mark.parametrize("method", METHODS)
def test_as_in_a_model(tiny, tmp_path, method):
    model = tiny("llama")
    other = {} if method in ("linear", "magnitude_prune", "dare_linear", "ties", "dare_ties") else {"r": 2}
    parts = [_save(model, tmp_path / "a", seed=1), _save(model, tmp_path / "b", seed=2, **other)]
    torch.manual_seed(7)
    found = blend_stored(parts, [0.7, -0.4], _recipe(method))
    torch.manual_seed(7)
    recipe = _recipe(method)
    blend(model, ["a", "b"], [0.7, -0.4], "c", method=method, density=recipe.density)
    (tmp_path / "c").mkdir()
    write_adapter(found.adapter, tmp_path / "c")
    again = read_adapter(tmp_path / "c")
    load_adapter(model, again, "d")
    ours, theirs = adapter_tensors(model, "c"), adapter_tensors(model, "d")
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert theirs[key].shape == tensor.shape
        if not method.startswith("dare"):  # it draws layer by layer, in the order of the file or of the model
            torch.testing.assert_close(theirs[key], tensor, rtol=1e-4, atol=1e-5, msg=key)
    assert again.config.r == again.config.lora_alpha == next(iter(again.factors.values()))["lora_A"].shape[0]
    assert found.distance < 1e-6 if method == "cat" else found.distance > 1e-3
    assert found.worst[0] in again.factors


def test_peft_reads_it(tiny, tmp_path, ids):
    model = tiny("llama")
    parts = [_save(model, tmp_path / "a", seed=1), _save(model, tmp_path / "b", seed=2, r=2)]
    (tmp_path / "c").mkdir()
    write_adapter(blend_stored(parts, [0.7, 0.3], _recipe("cat")).adapter, tmp_path / "c")
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "c")
    for name, weight in (("a", 0.7), ("b", 0.3)):
        for _, layer in adapted_layers(model):
            layer.adapter(name).scaling *= weight
    activate(model, ["a", "b"])
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_modules_saved_whole_come_along(tiny, tmp_path):
    model = tiny("llama")
    targets = ["q_proj"]
    a = _save(model, tmp_path / "a", seed=1, target_modules=targets, modules_to_save=["lm_head"])
    b = _save(model, tmp_path / "b", seed=2, target_modules=["v_proj"])
    (tmp_path / "c").mkdir()
    write_adapter(blend_stored([b, a], [1, 1], _recipe("cat")).adapter, tmp_path / "c")
    again = read_adapter(tmp_path / "c")
    assert again.config.modules_to_save == ["lm_head"]
    assert torch.equal(again.others["lm_head.weight"], a.others["lm_head.weight"])
    load_adapter(tiny("llama"), again)
    with pytest.raises(UserError, match="both trained lm_head"):
        blend_stored([a, dataclasses.replace(a, path=tmp_path)], [1, 1], _recipe("cat"))


def test_refusals(tiny, tmp_path):
    model = tiny("gpt2")
    a = _save(model, tmp_path / "a", seed=1)
    dora = _save(tiny("gpt2"), tmp_path / "dora", seed=1, use_dora=True)
    biased = _save(tiny("gpt2"), tmp_path / "biased", seed=1, bias="all")
    tokens = _save(tiny("gpt2"), tmp_path / "tokens", seed=1, trainable_token_indices=[3])
    small = _save(model, tmp_path / "small", seed=1, r=2)
    other = _save(tiny("llama"), tmp_path / "other", seed=1)
    copied = dataclasses.replace(a, others={"transformer.wte.weight": torch.zeros(3, 2)})
    sha = dataclasses.replace(a, provenance=dataclasses.replace(a.provenance, base_sha256="1" * 64))
    strange = dataclasses.replace(a, provenance=dataclasses.replace(a.provenance, base_sha256="2" * 64))
    wide = {
        name: {k: torch.cat([t, t], 1 if k == "lora_A" else 0) for k, t in f.items()} for name, f in a.factors.items()
    }
    for parts, weights, method, said in (
        ([a, dora], [1, 1], "cat", "DoRA"),
        ([a, biased], [1, 1], "cat", "trained biases"),
        ([a, tokens], [1, 1], "cat", "single trained tokens"),
        ([a, copied], [1, 1], "cat", "brings the whole of transformer.wte.weight, .* save_embedding_layers=False"),
        ([a, small], [1, 1], "linear", "equal ranks"),
        ([a, a], [1], "cat", "one weight for each"),
        ([a, a], [1, float("nan")], "cat", "finite"),
        ([sha, strange], [1, 1], "cat", "blend adapters of one base"),
        ([a, dataclasses.replace(a, factors=wide)], [1, 1], "cat", "different bases"),
    ):
        with pytest.raises(UserError, match=said):
            blend_stored(parts, weights, _recipe(method))
    blend_stored([sha, strange], [1, 1], _recipe("cat"), allow_other_base=True)
    assert other.factors.keys().isdisjoint(a.factors)


def _parts(seed, ranks, n, k):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [Part(str(i), draw(r, k), draw(n, r), 1.5 + i, 0.8 - i) for i, r in enumerate(ranks)]


RANKS = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(seed=st.integers(0, 999), ranks=RANKS, n=st.integers(1, 12), k=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_cat_is_the_weighted_sum_and_its_norm_is_known_from_factors(seed, ranks, n, k):
    parts = _parts(seed, ranks, n, k)
    a_RK, b_NR = blend_parts(parts, Recipe(method="cat"), 1)
    wanted_NK = sum(p.weight * p.scaling * p.b_NR @ p.a_RK for p in parts)
    torch.testing.assert_close(b_NR @ a_RK, wanted_NK)
    terms = [(p.weight * p.scaling, p.a_RK, p.b_NR) for p in parts]
    assert norm_of_sum(terms) == pytest.approx(torch.linalg.matrix_norm(wanted_NK).item(), rel=1e-9)
    assert norm_of_sum([*terms, (-1.0, a_RK, b_NR)]) == pytest.approx(0, abs=1e-9 * norm_of_sum(terms) + 1e-12)


@given(seed=st.integers(0, 999), rank=st.integers(1, 5), count=st.integers(1, 4), data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_order_of_parts_does_not_matter(seed, rank, count, data):
    parts = _parts(seed, [rank] * count, 7, 9)
    method = data.draw(st.sampled_from([m for m in METHODS if not m.startswith("dare")]))
    order = data.draw(st.permutations(range(count)))
    recipe = _recipe(method)
    one, two = (blend_parts([parts[i] for i in way], recipe, rank) for way in (range(count), order))
    torch.testing.assert_close(one[1] @ one[0], two[1] @ two[0])


@given(seed=st.integers(0, 999), ranks=RANKS, data=st.data())
@settings(max_examples=40, deadline=None)
def test_svd_at_full_rank_is_the_sum(seed, ranks, data):
    parts = _parts(seed, ranks, 7, 9)
    one, two = (blend_parts(parts, Recipe(method=m), sum(ranks)) for m in ("cat", "svd"))
    torch.testing.assert_close(one[1] @ one[0], two[1] @ two[0])


@given(seed=st.integers(0, 999), ranks=RANKS, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=30, deadline=None)
def test_merge_then_unmerge_is_the_identity(seed, ranks, dtype):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(9, 7, dtype=dtype), torch.nn.Linear(7, 5, bias=False, dtype=dtype))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for i, rank in enumerate(ranks):
        config = LoraConfig(r=rank, target_modules=["0", "1"], init_lora_weights=False)

        def make(layer, rank=rank, i=i):
            n, k = layer.weight.shape
            return LowRank(torch.randn(rank, k), torch.randn(n, rank), scaling=1.0 + i)

        inject(model, config, f"a{i}", make=make, chosen=["0", "1"])
    for count in range(1, len(ranks) + 1):
        merge(model, [f"a{i}" for i in range(count)])
        assert not torch.equal(model[0].weight, before["0.weight"])
    unmerge(model)
    after = {
        f"{name}.{key}": t for name, layer in adapted_layers(model) for key, t in layer.base_layer.state_dict().items()
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())
