"""Dropout with our masks in PEFT's layers: the same numbers, under LoRA and DoRA, and the same convention said aloud.

PEFT draws DoRA's base term from dropped inputs too, which needs a second frozen product; here it sees x itself. So
the masks stand before PEFT's ``lora_A`` and not in the place of its dropout where an adapter is DoRA.
"""

import peft
import pytest
import torch
from torch import nn

from deltaw.nn.batch import Batch, batch
from deltaw.nn.walk import adapted_layers
from deltaw.ops.dropout import DropoutKey

P = 0.4
KEY = DropoutKey(seed=5, step=2)


class _OurMask(nn.Module):
    """x∘m with the mask of one of our modules."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        return (rows * KEY.mask(P, self.name, 0).scale_for(rows)).view(x.shape)


def _put_masks_into(model, *, before_a):
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            mask = _OurMask(name)
            module.lora_dropout["default"] = nn.Identity() if before_a else mask
            if before_a:  # PEFT also multiplies A with the identity matrix, for its norm; that is no input
                module.lora_A["default"].register_forward_pre_hook(
                    lambda _, args, mask=mask: None if _is_identity(args[0]) else (mask(args[0]),)
                )


def _is_identity(x):
    return x.ndim == 2 and x.shape[0] == x.shape[1] and torch.equal(x, torch.eye(len(x)))


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_equal_masks_give_equal_numbers(bench, helpers, use_dora):
    config = dict(r=4, lora_alpha=6, target_modules=bench.names.all_linear, use_dora=use_dora, lora_dropout=P)
    pair = helpers.twins(bench, config)
    without = bench.outputs(pair.ours)
    _put_masks_into(pair.theirs, before_a=use_dora)
    for _, layer in adapted_layers(pair.ours.get_base_model()):
        layer.training = True  # adapters' dropout alone: the base's own would draw from torch's generator
    with batch(Batch(dropout=KEY)):
        helpers.assert_equal_numbers(pair)
        assert (bench.outputs(pair.ours) - without).abs().max() > 1e-3


def test_outside_our_loop_torchs_generator_decides(bench_of, helpers):
    bench = bench_of("llama")
    model = helpers.twins(bench, dict(target_modules="all-linear", lora_dropout=P)).ours.train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(bench.outputs(model))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_dora_without_dropout_of_its_base_term_is_pefts_where_the_magnitude_is_the_norm(bench_of, helpers):
    # There the column scale is one and the base term drops out of PEFT's sum: its own dropout gives our numbers.
    bench = bench_of("llama")
    config = dict(r=4, target_modules="all-linear", use_dora=True, lora_dropout=P)
    pair = helpers.twins(bench, config)
    _put_masks_into(pair.theirs, before_a=False)
    pair.theirs.train()
    for _, layer in adapted_layers(pair.ours.get_base_model()):
        layer.training = True
    with torch.no_grad():
        for name, layer in adapted_layers(pair.ours.get_base_model()):
            adapter = layer.adapter("default")
            adapter.lora_magnitude_vector.div_(layer.column_scale("default"))
            theirs = pair.theirs.base_model.model.get_submodule(name).lora_magnitude_vector["default"].weight
            theirs.copy_(adapter.lora_magnitude_vector)
    with batch(Batch(dropout=KEY)):
        torch.testing.assert_close(bench.outputs(pair.ours), bench.outputs(pair.theirs), atol=1e-5, rtol=1e-5)
