"""Blends are PEFT's, method by method, given equal factors; where PEFT's are not what they say, ours are."""

from functools import partial

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deltaw
from deltaw.adapters.blend import METHODS, Part, Recipe, blend, blend_parts, combine, svd_of_product
from deltaw.adapters.merge import merge, merge_and_unload, merged_names
from deltaw.adapters.peft_format import adapter_tensors, load_adapter, save_adapter
from deltaw.errors import UserError
from deltaw.nn.inject import activate, inject
from deltaw.nn.lowrank import LowRank
from deltaw.nn.state import state_of
from deltaw.nn.walk import adapted_layers, saved_modules

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to", "ignore:Model (has|with) `tie_word_embeddings", "ignore:Adapter name 'a'"
)
CLOSE = dict(atol=1e-5, rtol=1e-5)
PRUNING = [m for m in METHODS if m not in ("linear", "cat", "svd")]
ADAPTERS = {
    "a": dict(r=4, lora_alpha=6, target_modules=["c_attn", "c_fc", "q_proj", "up_proj"]),
    "b": dict(r=4, lora_alpha=2, target_modules=["c_attn", "c_proj", "q_proj", "down_proj"]),
    "c": dict(r=4, lora_alpha=9, target_modules=["c_attn", "c_fc", "q_proj", "up_proj"]),
}
UNEQUAL = {name: config | dict(r=r) for (name, config), r in zip(ADAPTERS.items(), (2, 6, 3), strict=True)}
SIGNED = [0.7, -0.4, 1.3]


def _settings(method, **more):
    return dict(density=0.4) | more if method in PRUNING else more


def _add(model, name, seed, **config):
    """A random adapter whose targets are narrowed to what the model has."""
    leaves = {n.rpartition(".")[2] for n, _ in model.named_modules()}
    config = config | dict(target_modules=[t for t in config["target_modules"] if t in leaves])
    inject(model, deltaw.LoraConfig(init_lora_weights=False, **config), name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def _model(base, adapters=ADAPTERS):
    for seed, (name, config) in enumerate(adapters.items()):
        _add(base, name, seed, **config)
    return base


def _deltas(model, name):
    return {t: layer.adapter(name).delta() for t, layer in adapted_layers(model) if name in layer.adapters}


def _peft_s(base, ours, adapters):
    """The same adapters in PEFT's model."""
    model = None
    for name, wanted in adapters.items():
        config = peft.LoraConfig(**wanted | dict(target_modules=sorted(state_of(ours).configs[name].target_modules)))
        model = peft.get_peft_model(base, config, name) if model is None else (model.add_adapter(name, config) or model)
        peft.set_peft_model_state_dict(model, adapter_tensors(ours, name), name)
    return model


def _peft_deltas(model, name):
    """PEFT's ΔW as [out, in]."""
    out = {}
    for target, module in model.base_model.model.named_modules():
        if name in getattr(module, "lora_A", {}) or name in getattr(module, "lora_embedding_A", {}):
            delta = module.get_delta_weight(name).detach()
            is_turned = name in module.lora_embedding_A or getattr(module, "fan_in_fan_out", False)
            out[target] = delta.T if is_turned else delta
    return out


def _both(tiny, architecture, method, weights, monkeypatch, adapters=ADAPTERS, **given):
    """(ours, PEFT's): ΔW by module, with equal draws where a method draws."""
    ours = _model(tiny(architecture), adapters)
    theirs = _peft_s(tiny(architecture), ours, adapters)
    torch.manual_seed(11)
    blend(ours, list(adapters), weights, "new", method=method, **given)
    inject_adapter = theirs.base_model.inject_adapter

    def inject_then_seed(*args, **kwargs):  # PEFT draws a start for the new adapter first
        inject_adapter(*args, **kwargs)
        torch.manual_seed(11)

    monkeypatch.setattr(theirs.base_model, "inject_adapter", inject_then_seed)
    theirs.add_weighted_adapter(list(adapters), weights, "new", method, **given)
    return _deltas(ours, "new"), _peft_deltas(theirs, "new")


def _compare(ours, theirs, atol=1e-5):
    assert ours.keys() == theirs.keys() and ours
    for target, delta in ours.items():
        assert delta.abs().max() > 1e-3
        torch.testing.assert_close(
            delta, theirs[target], atol=atol, rtol=1e-5, msg=lambda text, t=target: f"{t}: {text}"
        )


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], SIGNED], ids=["positive", "signed"])
@pytest.mark.parametrize("method", METHODS)
def test_as_peft_blends(tiny, method, weights, monkeypatch):
    _compare(*_both(tiny, "llama", method, weights, monkeypatch, **_settings(method)))


@pytest.mark.parametrize("method", [m for m in METHODS if "dare" not in m or not m.endswith("svd")])
def test_as_peft_blends_transposed_layers(tiny, method, monkeypatch):
    _compare(*_both(tiny, "gpt2", method, SIGNED, monkeypatch, **_settings(method)))


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties", "ties_svd", "magnitude_prune_svd"])
def test_as_peft_blends_embeddings(tiny, method, monkeypatch):
    adapters = {name: dict(r=4, lora_alpha=6, target_modules=["wte", "c_fc"]) for name in ("a", "b")}
    _compare(*_both(tiny, "gpt2", method, [0.7, -0.4], monkeypatch, adapters, **_settings(method)))


@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd", "dare_ties_svd", "magnitude_prune_svd"])
def test_as_peft_blends_unequal_ranks(tiny, method, monkeypatch):
    _compare(*_both(tiny, "llama", method, SIGNED, monkeypatch, UNEQUAL, **_settings(method)))


@pytest.mark.parametrize("method", ["ties", "ties_svd", "dare_ties", "dare_ties_svd"])
def test_as_peft_elects_by_frequency(tiny, method, monkeypatch):
    given = dict(density=0.5, majority_sign_method="frequency")
    _compare(*_both(tiny, "llama", method, SIGNED, monkeypatch, **given))


@pytest.mark.parametrize("method", [m for m in METHODS if m.endswith("svd")])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_as_peft_cuts_to_a_rank(tiny, method, rank, monkeypatch):
    both = _both(tiny, "llama", method, SIGNED, monkeypatch, **_settings(method, svd_rank=rank))
    _compare(*both, atol=1e-4)  # where two singular values lie close, float32 itself knows the cut no better


def test_clamping_is_close_to_peft_s(tiny, monkeypatch):
    """Theirs depends on the signs that singular vectors happen to have; ours is the same for all of them."""
    ours, theirs = _both(tiny, "llama", "svd", SIGNED, monkeypatch, svd_clamp=0.9)
    plain = _deltas(_model(tiny()), "a")
    for target, delta in ours.items():
        if target in plain:
            assert (delta - theirs[target]).norm() < 0.25 * theirs[target].norm()


def _exact(model, weights):
    out = {}
    for name, weight in zip(ADAPTERS, weights, strict=True):
        for target, delta in _deltas(model, name).items():
            out[target] = out.get(target, 0) + weight * delta
    return out


@pytest.mark.parametrize("adapters", [ADAPTERS, UNEQUAL], ids=["equal", "unequal"])
def test_cat_is_the_exact_sum(tiny, ids, adapters):
    model = _model(tiny(), adapters)
    exact = _exact(model, SIGNED)
    blend(model, list(adapters), SIGNED, "new", method="cat")
    for target, delta in _deltas(model, "new").items():
        torch.testing.assert_close(delta, exact[target], **CLOSE)
    activate(model, ["new"])
    apart = model(input_ids=ids).logits
    torch.testing.assert_close(merge_and_unload(model)(input_ids=ids).logits, apart, atol=1e-4, rtol=1e-4)


def test_svd_is_the_best_of_its_rank(tiny):
    model = _model(tiny())
    exact = _exact(model, SIGNED)
    blend(model, list(ADAPTERS), SIGNED, "new", svd_rank=3)
    for target, delta in _deltas(model, "new").items():
        s = torch.linalg.svdvals(exact[target])
        torch.testing.assert_close((delta - exact[target]).norm(), s[3:].norm(), atol=1e-4, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_svd_of_product_at_any_shape(n, k, m, rank, seed):
    draw = torch.Generator().manual_seed(seed)
    a, b = (
        torch.randn(m, k, generator=draw, dtype=torch.float64),
        torch.randn(n, m, generator=draw, dtype=torch.float64),
    )
    a_RK, b_NR = svd_of_product(a, b, rank)
    u, s, v = torch.linalg.svd(b @ a, full_matrices=False)
    torch.testing.assert_close(b_NR @ a_RK, (u[:, :rank] * s[:rank]) @ v[:rank])
    torch.testing.assert_close(a_RK @ a_RK.T, torch.eye(len(a_RK), dtype=torch.float64))


class TestRules:
    """Given masks and small numbers, by hand."""

    def recipe(self, method, **given):
        return Recipe(method=method, **dict(density=1.0) | given)

    def test_magnitude_keeps_the_largest(self):
        t = torch.tensor([[1.0, -4.0], [3.0, -2.0]])
        out = combine([t, t], [1.0, 2.0], self.recipe("magnitude_prune", density=0.5))
        assert torch.equal(out, torch.tensor([[0.0, -12.0], [9.0, 0.0]]))

    def test_ties_is_the_mean_of_those_that_agree(self):
        tensors = [torch.tensor([x]) for x in ([3.0, -1.0, 2.0, 0.0], [1.0, 2.0, -5.0, 0.0], [-2.0, 2.0, 1.0, 0.0])]
        total = combine(tensors, [1.0, 1.0, 1.0], self.recipe("ties"))
        assert torch.equal(total, torch.tensor([[2.0, 2.0, -5.0, 0.0]]))
        often = combine(tensors, [1.0, 1.0, 1.0], self.recipe("ties", majority_sign_method="frequency"))
        assert torch.equal(often, torch.tensor([[2.0, 2.0, 1.5, 0.0]]))
        weighted = combine(tensors, [1.0, 3.0, -1.0], self.recipe("ties"))
        assert torch.equal(weighted, torch.tensor([[3.0, 2.0, -15.0, 0.0]]))

    def test_dare_keeps_the_mean(self):
        torch.manual_seed(0)
        t = torch.randn(40, 50)
        recipe = self.recipe("dare_linear", density=0.3)
        draws = [combine([t], [1.0], recipe) for _ in range(400)]
        kept = torch.stack([d != 0 for d in draws]).float().mean()
        assert abs(kept - 0.3) < 0.005
        assert all(torch.equal(d[d != 0], (t / 0.3)[d != 0]) for d in draws[:5])
        assert (torch.stack(draws).mean(0) - t).abs().mean() < 0.1

    def test_density_one_prunes_nothing(self):
        t = torch.randn(3, 4)
        for method in ("magnitude_prune", "dare_linear"):
            assert torch.equal(combine([t], [1.0], self.recipe(method)), t)

    def test_linear_has_cross_terms_and_the_sign_once(self):
        a, b = torch.eye(2), torch.eye(2)
        parts = [Part("x", a, b, 2.0, -2.0)]
        a_RK, b_NR = blend_parts(parts, Recipe(method="linear"), 2)
        assert torch.equal(b_NR @ a_RK, -4 * torch.eye(2))
        parts = [Part("x", a, b, 1.0, 1.0), Part("y", a, b, 1.0, 1.0)]
        a_RK, b_NR = blend_parts(parts, Recipe(method="linear"), 2)
        assert torch.equal(b_NR @ a_RK, 4 * torch.eye(2))

    def test_clamp_is_blind_to_signs(self):
        draw = torch.Generator().manual_seed(0)
        part = Part("x", torch.randn(4, 9, generator=draw), torch.randn(7, 4, generator=draw), 1.0, 1.0)
        flipped = part._replace(a_RK=-part.a_RK, b_NR=-part.b_NR)
        recipe = Recipe(svd_clamp=0.8)
        out = [blend_parts([p], recipe, 4) for p in (part, flipped)]
        torch.testing.assert_close(out[0][1] @ out[0][0], out[1][1] @ out[1][0])
        plain = blend_parts([part], Recipe(), 4)
        limit = out[0][0].abs().max()
        values = torch.cat([t.flatten() for t in plain])
        torch.testing.assert_close(limit, torch.quantile(torch.cat([values, -values]), 0.8), atol=0.02, rtol=0.02)
        torch.testing.assert_close(blend_parts([part], Recipe(svd_clamp=1.0), 4), plain)

    def test_float64_stays_float64(self):
        parts = [Part(n, torch.randn(2, 5).double(), torch.randn(4, 2).double(), 1.0, 0.5) for n in "xy"]
        for method in METHODS:
            a_RK, b_NR = blend_parts(parts, Recipe(method=method, **_settings(method)), 2)
            assert a_RK.dtype == b_NR.dtype == torch.float64, method


class TestTheNewAdapter:
    def test_is_an_adapter_like_any_other(self, tiny, ids, tmp_path):
        model = _model(tiny(), UNEQUAL)
        activate(model, ["b"])
        blend(model, list(UNEQUAL), SIGNED, "new", method="cat")
        config = state_of(model).configs["new"]
        assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (11, 11, {}, {})
        assert state_of(model).active.names == ("b",)
        assert not any(p.requires_grad for _, layer in adapted_layers(model) for p in layer.adapters["new"].parameters()
                       if "new" in layer.adapters)  # fmt: skip
        activate(model, ["new"])
        wanted = model(input_ids=ids).logits
        save_adapter(model, tmp_path, "new")
        again = tiny()
        load_adapter(again, tmp_path)
        assert torch.equal(again(input_ids=ids).logits, wanted)
        theirs = peft.PeftModel.from_pretrained(tiny(), tmp_path)
        torch.testing.assert_close(theirs(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-4)
        activate(model, ["new"], trainable=True)
        model(input_ids=ids, labels=ids).loss.backward()

    def test_rslora_does_not_scale_it_again(self, tiny):
        rslora = {n: c | dict(use_rslora=True) for n, c in ADAPTERS.items()}
        model = _model(tiny(), rslora)
        exact = _exact(model, SIGNED)
        for method in ("cat", "linear"):
            blend(model, list(ADAPTERS), SIGNED, method, method=method)
        for target, delta in _deltas(model, "cat").items():
            torch.testing.assert_close(delta, exact[target], **CLOSE)
        blend(model, ["b"], [0.5], "half", method="linear")
        for target, delta in _deltas(model, "half").items():
            torch.testing.assert_close(delta, 0.5 * _deltas(model, "b")[target], **CLOSE)

    def test_patterns_are_honoured(self, tiny):
        patterns = dict(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 7, "up_proj": 1})
        model = _model(tiny(), {"a": ADAPTERS["a"] | patterns, "b": ADAPTERS["b"], "c": UNEQUAL["c"]})
        exact = _exact(model, SIGNED)
        blend(model, list(ADAPTERS), SIGNED, "new", method="cat")
        assert state_of(model).configs["new"].r == 9
        for target, delta in _deltas(model, "new").items():
            torch.testing.assert_close(delta, exact[target], **CLOSE)

    def test_one_adapter_gets_the_method_asked_for(self, tiny):
        model = _model(tiny())
        blend(model, ["a"], [1.0], "small", svd_rank=2)
        assert state_of(model).configs["small"].r == 2
        for target, delta in _deltas(model, "small").items():
            full = _deltas(model, "a")[target]
            s = torch.linalg.svdvals(full)
            torch.testing.assert_close((full - delta).norm(), s[2:].norm(), atol=1e-4, rtol=1e-4)

    def test_a_start_that_is_not_zero_counts_at_twice_the_rank(self, tiny):
        model = _model(tiny(), {"b": ADAPTERS["b"]})
        draw = torch.Generator().manual_seed(3)

        def make(layer):
            shapes = [(3, layer.in_features), (layer.out_features, 3)] * 2
            a, b, a0, b0 = (torch.randn(shape, generator=draw) for shape in shapes)
            return LowRank(a, b, scaling=0.5, start=(a0, b0))

        inject(model, deltaw.LoraConfig(r=3, target_modules=["q_proj"]), "a", make=make)
        for method, rank in (("cat", 10), ("svd", 10)):
            blend(model, ["a", "b"], [0.5, -1.0], method, method=method, svd_rank=10 if method == "svd" else None)
            assert state_of(model).configs[method].r == rank
            for target, delta in _deltas(model, method).items():
                exact = 0.5 * _deltas(model, "a").get(target, 0) - _deltas(model, "b")[target]
                torch.testing.assert_close(delta, exact, atol=1e-4, rtol=1e-4)
        blend(model, ["a", "a"], [1.0, 1.0], "twice", method="svd")
        assert state_of(model).configs["twice"].r == 6

    def test_a_head_trained_whole_comes_along(self, tiny):
        model = _add(tiny(), "a", 0, **ADAPTERS["a"])
        _add(model, "b", 1, **ADAPTERS["b"], modules_to_save=["lm_head"])
        blend(model, ["a", "b"], [0.5, 0.5], "new", method="cat")
        ((_, head),) = saved_modules(model)
        assert torch.equal(head.copies["new"].weight, head.copies["b"].weight)
        assert not torch.equal(head.copies["new"].weight, head.base_layer.weight)
        _add(model, "c", 2, **ADAPTERS["c"], modules_to_save=["lm_head"])
        with pytest.raises(UserError, match=r"b and c have both trained lm_head whole \(modules_to_save\)"):
            blend(model, ["a", "b", "c"], SIGNED, "other", method="cat")

    def test_merged_ones_are_unmerged_and_stay_active(self, tiny, ids):
        model = _model(tiny())
        activate(model, ["a"])
        before = model(input_ids=ids).logits
        merge(model)
        blend(model, ["a", "b"], [1.0, 1.0], "new", method="cat")
        assert merged_names(model) == () and state_of(model).active.names == ("a",)
        assert torch.equal(model(input_ids=ids).logits, before)

    def test_low_precision_factors_are_blended_in_float32(self, tiny, tmp_path):
        model = _model(tiny(dtype=torch.bfloat16))
        for name in "ab":
            for _, layer in adapted_layers(model):
                if name in layer.adapters:
                    layer.adapter(name).to(torch.bfloat16)
        blend(model, ["a", "b"], [0.3, 0.3], "new", method="cat")
        exact = {t: 0.3 * d for t, d in _deltas(model, "a").items()}
        for target, delta in _deltas(model, "b").items():
            exact[target] = exact.get(target, 0) + 0.3 * delta
        for target, layer in adapted_layers(model):
            assert layer.adapter("new").lora_A.dtype == torch.float32
            torch.testing.assert_close(layer.adapter("new").delta(), exact[target], **CLOSE)


class TestRefused:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (dict(method="mean"), "method='mean': expected one of linear, magnitude_prune"),
            (dict(method="linear", svd_rank=3), "svd_rank=3: expected nothing, since linear has no use for it"),
            (dict(method="cat", svd_clamp=0.9), "svd_clamp=0.9: expected nothing, since cat has no use for it"),
            (dict(svd_rank=0), "svd_rank=0: expected a rank from 1"),
            (dict(svd_clamp=0.2), "svd_clamp=0.2: expected a quantile over 0.5"),
            (dict(density=0.5), "density=0.5: expected nothing, since svd prunes nothing"),
            (dict(method="ties"), "density=None: expected a fraction over 0 and up to 1"),
            (dict(method="dare_ties_svd", density=0.0), "density=0.0: expected a fraction"),
            (dict(method="dare_ties_svd", density=1.5), "density=1.5: expected a fraction"),
            (dict(method="ties", density=0.5, majority_sign_method="most"), "expected total or frequency for ties"),
            (dict(majority_sign_method="frequency"), "majority_sign_method='frequency': expected total for svd"),
        ],
    )  # fmt: skip
    def test_settings(self, tiny, given, message):
        model = _model(tiny())
        with pytest.raises(UserError, match=message):
            blend(model, ["a", "b"], [1.0, 1.0], "new", **given)
        assert list(state_of(model).configs) == list(ADAPTERS)

    def test_names_and_weights(self, tiny):
        model = _model(tiny())
        mix = partial(blend, model, method="cat")
        for names, weights, message in [
            (["a", "b"], [1.0], "2 adapters and 1 weights; give one weight for each adapter"),
            ([], [], "0 adapters and 0 weights"),
            (["a", "b"], [1.0, float("inf")], "weight inf: expected a finite number"),
            (["a", "b"], [1.0, "x"], "weight 'x': expected a finite number"),
            (["a", "x"], [1.0, 1.0], r"no adapter 'x' in this model \(it has a, b, c\)"),
        ]:
            with pytest.raises(UserError, match=message):
                mix(names, weights, "new")
        with pytest.raises(UserError, match="adapter 'c' is already in the model"):
            mix(["a", "b"], [1.0, 1.0], "c")

    def test_unequal_ranks_where_factors_are_mixed(self, tiny):
        model = _model(tiny(), UNEQUAL)
        with pytest.raises(UserError, match=r"linear mixes factors, .*q_proj a has rank 2, b has rank 6, c has rank 3"):
            blend(model, list(UNEQUAL), SIGNED, "new", method="linear")

    def test_what_is_not_only_low_rank(self, tiny):
        model = _add(_model(tiny("gpt2")), "dora", 5, r=4, target_modules=["c_fc"], use_dora=True)
        _add(model, "biased", 6, r=4, target_modules=["c_fc"], bias="all")
        with pytest.raises(UserError, match="adapter 'dora' has a DoRA magnitude, which can't be blended"):
            blend(model, ["a", "dora"], [1.0, 1.0], "new")
        with pytest.raises(UserError, match="adapter 'biased' has trained biases, which can't be blended"):
            blend(model, ["a", "biased"], [1.0, 1.0], "new")
