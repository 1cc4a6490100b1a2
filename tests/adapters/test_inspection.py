"""What inspection says is strange, and how it compares two."""

import dataclasses
import json
import math

import pytest
import torch

from deltaw.adapters.inspection import compare_adapters, inspect_adapter, outliers
from deltaw.adapters.peft_format import Provenance, StoredAdapter
from deltaw.config import LoraConfig
from deltaw.errors import UserError


def adapter(tmp_path, seed=0, *, r=3, layers=8, grow=None, **config):
    """An adapter without a model: one linear module in each of some layers."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for i in range(layers):
        a, b = torch.randn(r, 6, generator=generator), torch.randn(5, r, generator=generator)
        factors[f"model.layers.{i}.q_proj"] = {"lora_A": a, "lora_B": b * (grow or {}).get(i, 1)}
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["q_proj"], **config)
    return StoredAdapter(tmp_path / f"adapter{seed}", config, factors, {}, Provenance(), 0)


def test_figures_and_totals(tmp_path):
    stored = adapter(tmp_path)
    found = inspect_adapter(stored)
    total = 0.0
    for m in found.modules:
        dense = 2 * (stored.factors[m.name]["lora_B"] @ stored.factors[m.name]["lora_A"]).double()
        s = torch.linalg.svdvals(dense)[:3]
        torch.testing.assert_close(torch.tensor(m.singular_values, dtype=torch.float64), s, atol=1e-5, rtol=1e-5)
        assert (m.rank, m.scaling, m.shape, m.num_parameters, m.has_moved) == (3, 2.0, (5, 6), 33, True)
        assert m.relative_norm is None and m.base_norm is None
        total += m.norm**2
        share = s.square().cumsum(0) / s.square().sum()
        assert (m.rank_90, m.rank_99) == tuple(int((share < e).sum()) + 1 for e in (0.9, 0.99))
    totals = found.totals
    assert (totals["modules"], totals["parameters"], totals["relative_norm"]) == (8, 8 * 33, None)
    assert totals["norm"] == pytest.approx(math.sqrt(total))
    assert totals["parameters_at_99"] == sum(11 * m.rank_99 for m in found.modules)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["totals"] == totals


def test_outliers_by_the_rule_that_is_stated(tmp_path):
    found = inspect_adapter(adapter(tmp_path, grow={2: 40, 5: 0.01}))
    assert found.totals["outliers"] == ["model.layers.2.q_proj", "model.layers.5.q_proj"]
    assert not inspect_adapter(adapter(tmp_path, layers=4, grow={2: 40})).totals["outliers"]  # too few to say
    alike = [0.0, 0.0, 0.0, 0.0, math.log(1.9)]
    assert outliers(alike) == [False] * 5 and outliers([*alike[:4], math.log(2.1)]) == [False] * 4 + [True]


def test_what_is_wrong_is_named(tmp_path):
    stored = adapter(tmp_path, grow={3: 0})
    stored.factors["model.layers.4.q_proj"]["lora_A"][1, 2] = math.nan
    others = {"model.norm.weight": torch.tensor([1.0, math.inf]), "model.x.bias": torch.zeros(3)}
    stored = dataclasses.replace(stored, others=others)
    found = inspect_adapter(stored)
    assert found.totals["not_moved"] == ["model.layers.3.q_proj"]
    assert found.totals["not_finite"] == ["model.layers.4.q_proj", "model.norm.weight"]
    bad = found.modules[4]
    assert (bad.num_not_finite, bad.norm, bad.singular_values, bad.rank_90, bad.has_moved) == (1, None, (), None, None)
    assert found.modules[3].rank_99 == 0
    assert found.others["model.x.bias"]["what"] == "bias" and found.totals["other_parameters"] == 5
    json.dumps(found.to_dict(), allow_nan=False)


def test_two_of_unequal_ranks(tmp_path):
    one, other = adapter(tmp_path, 0), adapter(tmp_path, 1, r=5, layers=10)
    found = compare_adapters(one, other)
    assert len(found.modules) == 8 and found.only_other == ("model.layers.8.q_proj", "model.layers.9.q_proj")
    dense = [
        {n: s.config.scaling_of(n) * (p["lora_B"] @ p["lora_A"]).double() for n, p in s.factors.items()}
        for s in (one, other)
    ]
    product = sum(float((dense[0][n] * dense[1][n]).sum()) for n in dense[0])
    norms = [math.sqrt(sum(float(d.square().sum()) for d in ds.values())) for ds in dense]
    assert found.norms == pytest.approx(norms) and found.cosine == pytest.approx(product / math.prod(norms))
    apart = [dense[1][n] - dense[0].get(n, 0) for n in dense[1]]
    assert found.distance == pytest.approx(math.sqrt(sum(float(d.square().sum()) for d in apart)))
    same = compare_adapters(one, one)
    assert same.cosine == pytest.approx(1) and same.distance == pytest.approx(0, abs=1e-5)
    json.dumps(found.to_dict(), allow_nan=False)


def test_what_cannot_be_compared_is_refused(tmp_path):
    one = adapter(tmp_path)
    name, parts = next(iter(one.factors.items()))
    wider = dataclasses.replace(one, factors={name: {"lora_A": torch.randn(3, 7), "lora_B": parts["lora_B"]}})
    with pytest.raises(UserError, match="give adapters of one base"):
        compare_adapters(one, wider)
    with pytest.raises(UserError, match="no module in common"):
        compare_adapters(one, dataclasses.replace(one, factors={"x.q_proj": parts}))
    with pytest.raises(UserError, match="no numbers"):
        compare_adapters(dataclasses.replace(one, factors={name: {k: v / 0 for k, v in parts.items()}}), one)
    still = dataclasses.replace(one, factors={n: p | {"lora_B": p["lora_B"] * 0} for n, p in one.factors.items()})
    found = compare_adapters(one, still)
    assert found.cosine is None and all(like.cosine is None for like in found.modules.values())


def test_dora_and_others_are_named_as_what_they_are(tmp_path):
    stored = adapter(tmp_path, use_dora=True)
    stored = dataclasses.replace(stored, others={"x.bias": torch.zeros(2)})
    notes = " ".join(inspect_adapter(stored).notes)
    assert "is a DoRA adapter: ranks and singular values are of s·B·A" in notes
    assert "also has 1 tensor beside its low-rank ones" in notes
