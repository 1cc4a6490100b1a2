"""Loss scaling over a float16 base: what would vanish is learnt, and what overflows costs a step and nothing more."""

import dataclasses

import pytest
import torch

from deltaw.config import LoraConfig
from deltaw.errors import UserError
from deltaw.nn.inject import inject
from deltaw.train import loop, scaling
from deltaw.train.checkpoint import Progress, read_state
from deltaw.train.events import Stepped, Warned
from deltaw.train.forward import LanguageModel, examine
from deltaw.train.loop import Job, trainable_parameters, unfreeze
from deltaw.train.optim import AdamW
from deltaw.train.options import TrainOptions


@pytest.fixture
def job(tiny, examples):
    """``job(dtype)``: a job of four steps on a small model whose base has that dtype (here on the CPU)."""

    def make(dtype=torch.float16, *, full=False, seed=0, **given):
        model = tiny(dtype=dtype)
        torch.manual_seed(seed)
        unfreeze(model) if full else inject(model, LoraConfig(r=4, target_modules="all-linear"))
        usual = dict(data="x", batch_size=4, max_steps=4, learning_rate=1e-2, warmup_steps=0, lr_scheduler="constant")
        options = TrainOptions(**usual | given)
        return Job(language_model=examine(model), options=options, train_tokens=examples(8), eval_tokens=())

    return make


def test_the_scale_falls_at_once_and_rises_after_many_good_steps():
    assert scaling.adjusted(1024, 1999, is_finite=False) == (512, 0)
    assert scaling.adjusted(1.0, 5, is_finite=False) == (1.0, 0)
    assert scaling.adjusted(1024, 0, is_finite=True) == (1024, 1)
    assert scaling.adjusted(1024, scaling.INTERVAL - 1, is_finite=True) == (2048, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_bases_are_not_scaled(job, dtype):
    made = job(dtype)
    list(made.run())
    assert (made.progress.loss_scale, made.progress.steps_at_loss_scale) == (1.0, 0)


@pytest.mark.parametrize("full", [False, True])
def test_small_gradients_are_learnt_over_float16(job, monkeypatch, full):
    # A loss so small that its gradients are below 6e-8: without a scale, all zero in float16.
    honest = LanguageModel.loss
    monkeypatch.setattr(LanguageModel, "loss", lambda *args: honest(*args) * 1e-6)
    given = dict(full=full, max_grad_norm=0, max_steps=1)
    wanted, scaled = (
        next(e for e in job(d, **given).run() if isinstance(e, Stepped)) for d in (torch.float32, torch.float16)
    )
    assert scaled.grad_norm == pytest.approx(wanted.grad_norm, rel=0.02)
    monkeypatch.setattr(scaling, "FIRST", 1.0)
    lost = next(e for e in job(**given).run() if isinstance(e, Stepped))
    assert lost.grad_norm < 0.5 * wanted.grad_norm


def test_a_float16_base_learns_as_a_float32_one(job):
    one, other = job(torch.float32), job(torch.float16)
    losses = [[e.loss for e in made.run() if isinstance(e, Stepped) and not e.is_skipped] for made in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert other.progress.loss_scale > 1 and other.progress.steps_at_loss_scale == 4
    assert {p.dtype for p in trainable_parameters(other.language_model.model).values()} == {torch.float32}


def test_an_overflow_costs_a_step_and_halves_the_scale(job, monkeypatch):
    monkeypatch.setattr(scaling, "FIRST", 2.0**30)
    made = job(max_steps=30)
    parameters = trainable_parameters(made.language_model.model)
    before, told = {}, []
    for event in made.run():
        told.append(event)
        if isinstance(event, Stepped) and event.is_skipped and before:
            assert all(torch.equal(before[name], parameters[name]) for name in parameters)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    skipped = [e.step for e in told if isinstance(e, Stepped) and e.is_skipped]
    assert skipped[:11] == list(range(1, 12)) and loop.MAX_SKIPS < 11 <= len(skipped) < 20
    assert made.progress.loss_scale == 2.0 ** (30 - len(skipped))
    first = next(e for e in told if isinstance(e, Warned))
    assert first.message.endswith(f"no weight was moved, and the loss scale is now {2**29}")


def test_what_no_scale_mends_ends_the_run(job, monkeypatch):
    honest = LanguageModel.loss
    monkeypatch.setattr(LanguageModel, "loss", lambda *args: honest(*args) * float("nan"))
    made = job(max_steps=100)
    with pytest.raises(UserError, match="not finite for 10 steps in a row"):
        list(made.run())
    assert made.progress.step == 16  # 2¹⁶ was halved to 1


def test_the_scale_survives_a_checkpoint(job, tmp_path):
    made = dataclasses.replace(job(save_every=2), folder=tmp_path)
    list(made.run())
    progress, _, _ = read_state(tmp_path / "checkpoints" / "step-00000004")
    assert progress.loss_scale == made.progress.loss_scale > 1
    again = dataclasses.replace(job(), progress=Progress(**dataclasses.asdict(progress)))
    assert again.progress == progress


def test_gradients_are_unscaled_in_float32_before_they_are_clipped():
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = AdamW({"a": parameter}, weight_decay=0.0)
    parameter.grad = torch.full_like(parameter, 2.0)
    assert optimizer.clip(0.0, loss_scale=2.0**26) == pytest.approx(3**0.5 * 2.0**-25)  # zero in float16
    (gradient,) = optimizer.gradients()
    assert gradient.dtype == torch.float32 and gradient[0] == 2.0**-25
