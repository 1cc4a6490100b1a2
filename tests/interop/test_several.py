"""Several adapters of different kinds in one model: switched, summed, and mixed by row, each as PEFT does it."""

from contextlib import nullcontext
from typing import NamedTuple

import peft
import pytest
import torch

import deltaw
from deltaw.nn.attention import use_packed_attention
from deltaw.nn.batch import Batch, batch

PLAIN_ROWS = ["a", "__base__", "b", "b", "a", "__base__", "a"]
ROWS = ["a", "__base__", "b", "d", "a", "__base__", "s"]


class Pair(NamedTuple):
    ours: deltaw.PeftModel
    theirs: peft.PeftModel
    mixed: torch.Tensor | None
    """What PEFT says to ``PLAIN_ROWS``."""


def _configs(names):
    targets = names.all_linear
    return {
        "a": dict(r=2, target_modules=targets),
        "b": dict(r=5, lora_alpha=3, use_rslora=True, target_modules=[names.embedding, names.attention]),
        "d": dict(r=4, use_dora=True, target_modules=[names.attention]),
        "s": dict(r=3, target_modules=[names.attention], modules_to_save=[names.head or "token_type_embeddings"]),
    }


@pytest.fixture(scope="module")
def pair(bench, helpers, tmp_path_factory):
    """The same four adapters, written by us, in our model and in PEFT's."""
    folder = tmp_path_factory.mktemp("adapters")
    ours = theirs = mixed = None
    for name, config in _configs(bench.names).items():
        written = bench.adapt_ours(config, name)
        helpers.stir(helpers.trained_by_us(written, name).values())
        written.save_pretrained(folder)
        if ours is None:
            ours = bench.load_ours(folder / name, adapter_name=name)
            theirs = bench.load_theirs(folder / name, adapter_name=name)
        else:
            ours.load_adapter(folder / name, name)
            with helpers.peft_may_warn():
                theirs.load_adapter(folder / name, name)
        if name == "b" and bench.architecture != "opt":
            # The last moment that PEFT can: not with DoRA, nor where some adapters save a module and some don't.
            # OPT's MLP sees rows of tokens, which PEFT takes for rows of the batch.
            mixed = bench.outputs(theirs.eval(), len(PLAIN_ROWS), adapter_names=PLAIN_ROWS)
    return Pair(ours, theirs.eval(), mixed)


def test_each_adapter_alone(bench, pair, helpers):
    found = []
    for name in _configs(bench.names):
        for model in (pair.ours, pair.theirs):
            model.set_adapter(name)
        found.append(bench.outputs(pair.ours))
        torch.testing.assert_close(found[-1], bench.outputs(pair.theirs), atol=1e-5, rtol=1e-5)
        assert helpers.layers_of_ours(pair.ours, name) == helpers.layers_of_theirs(pair.theirs, name)
    with pair.ours.disable_adapter():
        found.append(bench.outputs(pair.ours))
    assert torch.equal(found[-1], bench.outputs(bench.prototype))
    for i, one in enumerate(found):
        assert all((one - other).abs().max() > 1e-3 for other in found[:i])


def test_two_at_once_add_up(bench, pair):
    for model in (pair.ours, pair.theirs):
        model.base_model.set_adapter(["a", "b"])
    torch.testing.assert_close(bench.outputs(pair.ours), bench.outputs(pair.theirs), atol=1e-5, rtol=1e-5)


def test_each_row_has_its_own(bench, pair):
    alone = {"__base__": bench.outputs(bench.prototype, len(ROWS))}
    for name in _configs(bench.names):
        pair.theirs.set_adapter(name)
        alone[name] = bench.outputs(pair.theirs, len(ROWS))
    wanted = torch.stack([alone[name][row] for row, name in enumerate(ROWS)])
    found = bench.outputs(pair.ours, len(ROWS), adapter_names=ROWS)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_each_example_laid_end_to_end_has_its_own(bench, pair):
    if not bench.is_decoder:
        return
    ids = bench.inputs(len(ROWS))["input_ids"]
    examples = [row[: 3 + i] for i, row in enumerate(ids)]
    alone = []
    for name, example in zip(ROWS, examples, strict=True):
        with pair.ours.disable_adapter() if name == "__base__" else nullcontext(pair.ours.set_adapter(name)):
            alone.append(pair.ours(input_ids=example[None], use_cache=False).logits[0])
    pair.ours.set_adapter("a")
    lengths = tuple(map(len, examples))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    model = pair.ours.get_base_model()
    with use_packed_attention(model), batch(Batch(lengths=lengths, adapters=tuple(ROWS))):
        packed = model(torch.cat(examples)[None], position_ids=positions, use_cache=False).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_pefts_own_mixed_batch(bench, pair):
    if pair.mixed is not None:
        found = bench.outputs(pair.ours, len(PLAIN_ROWS), adapter_names=PLAIN_ROWS)
        torch.testing.assert_close(found, pair.mixed, atol=1e-5, rtol=1e-5)
