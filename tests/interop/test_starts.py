"""Starts: step 0 is the base, and what is trained from a start is one function here and in PEFT.

PEFT takes a start that isn't zero (PiSSA, OLoRA) off the base's weight. Here the adapter itself does, beside a base
that others share, and its file is a plain LoRA that fits the original base.
"""

import peft
import pytest
import torch

import deltaw
from deltaw.nn.walk import adapted_layers

STARTS = ["gaussian", "orthogonal", "pissa", "olora", "loftq", "eva"]
CLOSE = dict(atol=1e-4, rtol=1e-4)  # of factorisations in float32


def _config(bench, start, **more):
    return dict(r=4, lora_alpha=6, target_modules=bench.names.all_linear, init_lora_weights=start) | more


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva' but `eva_config`")
def test_step_0_is_the_base(bench, start):
    ours = bench.adapt_ours(_config(bench, start))
    torch.testing.assert_close(bench.outputs(ours), bench.outputs(bench.prototype), **CLOSE)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_trained_from_a_start(bench, helpers, tmp_path, start):
    if bench.architecture == "gpt2" and start == "olora":
        pytest.skip("PEFT factors Conv1D's weight as it lies, transposed")
    ours, theirs = bench.adapt_ours(_config(bench, start)), bench.adapt_theirs(_config(bench, start))
    modules = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for name, layer in adapted_layers(ours.get_base_model()):
            mine, twin = layer.adapter("default"), modules[name]
            a, b = twin.lora_A["default"].weight, twin.lora_B["default"].weight
            torch.testing.assert_close(mine.lora_B @ mine.lora_A, b @ a, **CLOSE)
            for own, start_of_own, other in ((mine.lora_A, mine.start_A, a), (mine.lora_B, mine.start_B, b)):
                start_of_own.copy_(other)  # singular vectors may come with other signs
                helpers.stir([other])
                own.copy_(other)
    adapted = bench.outputs(ours)
    torch.testing.assert_close(adapted, bench.outputs(theirs), **CLOSE)
    assert (adapted - bench.outputs(bench.prototype)).abs().max() > 0.01

    # The file says all of it, to the original base.
    ours.save_pretrained(tmp_path / "ours")
    by_them = bench.load_theirs(tmp_path / "ours")
    torch.testing.assert_close(bench.outputs(by_them), adapted, **CLOSE)
    helpers.save_theirs(by_them, tmp_path / "theirs")
    written, again = helpers.tensors(tmp_path / "ours"), helpers.tensors(tmp_path / "theirs")
    assert written.keys() == again.keys() and all(torch.equal(written[k], again[k]) for k in written)
    torch.testing.assert_close(bench.outputs(bench.load_ours(tmp_path / "theirs")), adapted, **CLOSE)


@pytest.fixture
def trained_by_peft(bench_of, helpers, tmp_path):
    """``trained_by_peft("gpt2", "pissa")``: (bench, PEFT's model, its folder), saved as PEFT does unless told more."""

    def make(architecture, start, **more):
        bench = bench_of(architecture)
        model = bench.adapt_theirs(_config(bench, start, **more))
        if start == "eva":
            rows = torch.multinomial(0.6 ** torch.arange(30.0), 6 * 40, replacement=True).view(2, 3, 40)
            with helpers.peft_may_warn():
                peft.initialize_lora_eva_weights(model, [{"input_ids": ids} for ids in rows], show_progress_bar=False)
        helpers.stir(p for p in model.parameters() if p.requires_grad)
        helpers.save_theirs(model, tmp_path)
        return bench, model, tmp_path

    return make


@pytest.mark.parametrize(
    ("architecture", "start", "more"),
    [
        ("llama", "pissa", {}),
        ("llama", "pissa", dict(use_dora=True, use_rslora=True)),
        ("llama", "olora", dict(rank_pattern={"q_proj": 2})),
        ("gpt2", "pissa", {}),
        ("llama", "orthogonal", {}),
        ("llama", "eva", dict(eva_config=peft.EvaConfig(rho=2.0))),
        ("gpt2", "eva", dict(eva_config=peft.EvaConfig(rho=2.0))),
    ],
)
def test_pefts_file_with_a_start_that_was_not_converted(trained_by_peft, architecture, start, more):
    # PEFT finds PiSSA's and OLoRA's start again from the base, each time that it loads such a file.
    bench, theirs, folder = trained_by_peft(architecture, start, **more)
    ours = bench.load_ours(folder)
    torch.testing.assert_close(bench.outputs(ours), bench.outputs(theirs), **CLOSE)
    ours.save_pretrained(folder / "converted")
    torch.testing.assert_close(bench.outputs(bench.load_theirs(folder / "converted")), bench.outputs(theirs), **CLOSE)


def test_a_start_that_can_not_be_found_again_is_refused(trained_by_peft):
    bench, _, folder = trained_by_peft("llama", "pissa_niter_4")
    with pytest.raises(deltaw.UserError, match="changed its base, and how can't be found again"):
        bench.load_ours(folder)
