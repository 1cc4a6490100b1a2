"""The loop: layout, accumulation and interruption never change what is learnt."""

import math

import pytest
import torch

from deltaw.config import LoraConfig
from deltaw.errors import UserError
from deltaw.nn.inject import inject
from deltaw.nn.walk import adapted_layers
from deltaw.train import loop
from deltaw.train.checkpoint import Progress
from deltaw.train.events import Evaluated, Saved, Started, Stepped, Stopped, Warned, as_json
from deltaw.train.forward import LanguageModel, examine
from deltaw.train.loop import Job, trainable_parameters, unfreeze
from deltaw.train.optim import AdamW, learning_rate_at, unmoved
from deltaw.train.options import TrainOptions


def _job(model, train, held_out=(), *, adapter=None, folder=None, should_stop=lambda: False, **given):
    usual = dict(batch_size=4, max_steps=4, learning_rate=1e-2, warmup_steps=0, lr_scheduler="constant")
    options = TrainOptions(data="x", eval_data="y" if held_out else None, **usual | given)
    torch.manual_seed(0)
    if adapter is None:
        unfreeze(model)
    else:
        inject(model, LoraConfig(**dict(r=4, target_modules="all-linear") | adapter))
    return Job(
        language_model=examine(model), options=options, train_tokens=train, eval_tokens=held_out, folder=folder,
        should_stop=should_stop,
    )  # fmt: skip


def _train(*args, **kwargs):
    """(what was told, the trained weights)."""
    job = _job(*args, **kwargs)
    told = list(job.run())
    return told, {n: p.detach().clone() for n, p in trainable_parameters(job.language_model.model).items()}


def _steps(told):
    return [event for event in told if isinstance(event, Stepped)]


def _assert_same_run(one, other, tolerance=1e-5):
    for a, b in zip(_steps(one[0]), _steps(other[0]), strict=True):
        assert a.loss == pytest.approx(b.loss, abs=tolerance)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3)
    assert one[1].keys() == other[1].keys()
    for name, weight in one[1].items():
        torch.testing.assert_close(weight, other[1][name], rtol=0, atol=tolerance)


ADAPTERS = [
    pytest.param({}, id="lora"),
    pytest.param(dict(lora_dropout=0.3), id="dropout"),
    pytest.param(dict(lora_dropout=0.3, use_dora=True), id="dora and dropout"),
    pytest.param(dict(bias="all"), id="biases"),
]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_uneven_micro_batches_equal_one_batch(tiny, architecture, examples, adapter):
    if adapter.get("bias") and architecture == "llama":
        pytest.skip("a Llama has no biases")
    # A rate at which Adam doesn't blow the last bits of tiny gradients up.
    runs = [
        _train(tiny(architecture), examples(8), adapter=adapter, micro_batch_tokens=tokens, learning_rate=1e-3)
        for tokens in (10_000, 25, 1)
    ]
    _assert_same_run(runs[0], runs[1])
    _assert_same_run(runs[0], runs[2])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_accumulation_equals_a_larger_batch(tiny, examples, batch_size):
    adapter = dict(lora_dropout=0.2)
    whole = _train(tiny(), examples(9), adapter=adapter, batch_size=4)
    parts = _train(tiny(), examples(9), adapter=adapter, batch_size=batch_size, gradient_accumulation=4 // batch_size)
    _assert_same_run(whole, parts, tolerance=0)


def test_one_step_is_the_gradient_of_the_mean_over_supervised_tokens(tiny, examples):
    model, batch = tiny(), examples(4)
    job = _job(model, batch, adapter={}, max_steps=1, micro_batch_tokens=20, max_grad_norm=0)
    order = [batch[i] for i in job.sampler.indices(0)]
    losses = []
    for tokens in order:
        logits = model(torch.tensor([tokens.input_ids])).logits[0]
        losses += [
            -logits[at - 1].log_softmax(0)[token]
            for at, (token, flag) in enumerate(zip(tokens.input_ids, tokens.supervised, strict=True))
            if flag and at
        ]
    parameters = trainable_parameters(model)
    mean = torch.stack(losses).mean()
    gradients = torch.autograd.grad(mean, list(parameters.values()))
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt().item()
    stepped = _steps(job.run())[0]
    assert stepped.loss == pytest.approx(mean.item(), rel=1e-5)
    assert stepped.grad_norm == pytest.approx(norm, rel=1e-4)
    assert stepped.num_supervised == len(losses)


def test_dora_norms_follow_the_weights(tiny, examples):
    # The norm is kept until A or B change; the fused optimiser changes them unseen unless it says so.
    model = tiny()
    job = _job(model, examples(8), adapter=dict(use_dora=True), max_steps=3)
    list(job.run())
    for _, layer in adapted_layers(model):
        adapter = layer.adapter("default")
        merged = layer.weight + adapter.delta()
        wanted = adapter.lora_magnitude_vector / merged.norm(dim=1)
        torch.testing.assert_close(layer.column_scale("default"), wanted)


def test_the_epochs_visit_every_example_and_the_last_step_takes_the_rest(tiny, examples):
    told, _ = _train(tiny(), examples(10), adapter={}, max_steps=None, epochs=2)
    assert [s.num_examples for s in _steps(told)] == [4, 4, 2] * 2
    assert [s.epoch for s in _steps(told)] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert sum(s.num_tokens for s in _steps(told)) == 2 * sum(len(t.input_ids) for t in examples(10))


@pytest.mark.parametrize(
    ("given", "steps"),
    [(dict(epochs=0.5), 2), (dict(epochs=1.34), 4), (dict(epochs=0.01), 1), (dict(epochs=2, max_steps=1), 1)],
)
def test_number_of_steps(tiny, examples, given, steps):
    told, _ = _train(tiny(), examples(10), adapter={}, **dict(max_steps=None) | given)
    assert len(_steps(told)) == steps == told[0].num_steps


def test_what_is_told_in_which_order(tiny, examples):
    told, _ = _train(tiny(), examples(8), examples(3, seed=9), adapter={}, eval_every=2, max_steps=3)
    kinds = [event.kind for event in told]
    evaluation = ["evaluating", "eval"]
    assert kinds == ["started", *evaluation, "step", "step", *evaluation, "step", *evaluation, "stopped"]
    started = told[0]
    assert isinstance(started, Started)
    assert started.num_examples == 8 and started.num_tokens == sum(len(t.input_ids) for t in examples(8))
    assert 0 < started.trainable_parameters < started.total_parameters
    evaluated = [event for event in told if isinstance(event, Evaluated)]
    assert [e.step for e in evaluated] == [0, 2, 3]
    assert told[-1] == Stopped(step=3, reason="done")


@pytest.mark.parametrize(("every", "at"), [(0, [0, 5]), (2, [0, 2, 4, 5]), ("epoch", [0, 3, 5]), (100, [0, 5])])
def test_when_it_evaluates(tiny, examples, every, at):
    told, _ = _train(tiny(), examples(10), examples(2), adapter={}, eval_every=every, max_steps=5)
    assert [e.step for e in told if isinstance(e, Evaluated)] == at


# --- bad batches ---


def _spoil(monkeypatch, steps):
    """Make the loss not a number in these steps."""
    honest = LanguageModel.loss

    def loss(self, packed, dropout=None):
        value = honest(self, packed, dropout)
        return value * float("nan") if dropout is not None and dropout.step in steps else value

    monkeypatch.setattr(LanguageModel, "loss", loss)


def test_one_bad_step_moves_no_weight_and_ends_nothing(tiny, examples, monkeypatch):
    _spoil(monkeypatch, {1})
    job = _job(tiny(), examples(8), adapter={})
    weights, states, told = [], [], []
    for event in job.run():
        told.append(event)
        if isinstance(event, Stepped):
            weights.append([p.detach().clone() for p in job.optimizer.parameters.values()])
            states.append({k: v.clone() for k, v in job.optimizer.state().items()})
    assert [s.is_skipped for s in _steps(told)] == [False, True, False, False]
    assert all(map(torch.equal, weights[0], weights[1]))
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(map(torch.equal, weights[1], weights[2]))
    assert all(p.isfinite().all() for p in weights[3])
    assert [e.message for e in told if isinstance(e, Warned)] == [
        "step 2: the gradient is not finite; no weight was moved"
    ]
    assert as_json(_steps(told)[1])["loss"] is None
    assert (job.progress.num_skips, job.progress.skips_in_a_row) == (1, 0)


def test_ten_bad_steps_in_a_row_end_the_run(tiny, examples, monkeypatch):
    _spoil(monkeypatch, set(range(3, 100)))
    job = _job(tiny(), examples(8), adapter={}, max_steps=50)
    with pytest.raises(UserError, match=r"10 steps in a row \(step 13\); lower --learning-rate 0.01"):
        list(job.run())


def test_nine_bad_steps_in_a_row_do_not(tiny, examples, monkeypatch):
    _spoil(monkeypatch, {*range(1, 10), *range(11, 20)})
    told, _ = _train(tiny(), examples(8), adapter={}, max_steps=22)
    assert sum(s.is_skipped for s in _steps(told)) == 18


def test_a_step_without_targets_has_a_finite_loss_and_moves_nothing(tiny, examples):
    silent = [type(t)(input_ids=t.input_ids, supervised=[False] * len(t.input_ids), origin="x") for t in examples(8)]
    before = tiny()
    told, weights = _train(tiny(), silent, max_steps=12)
    assert [s.loss for s in _steps(told)] == [0.0] * 12
    assert all(s.is_skipped for s in _steps(told))
    assert told[2].message == "step 1: none of its tokens is supervised; no weight was moved"
    assert all(torch.equal(weights[n], p) for n, p in before.named_parameters())


def test_a_micro_batch_without_targets_beside_one_with_them(tiny, examples):
    silent = [type(t)(input_ids=t.input_ids, supervised=[False] * len(t.input_ids), origin="x") for t in examples(2)]
    mixed = [*silent, *examples(2, seed=3)]
    one, other = (_train(tiny(), mixed, adapter={}, micro_batch_tokens=n, learning_rate=1e-3) for n in (1, 1000))
    _assert_same_run(one, other)


# --- early stop, best, interruption ---


def _evaluations(monkeypatch, losses):
    given = iter(losses)
    monkeypatch.setattr(loop, "mean_loss", lambda *_: (next(given), 10))


def test_early_stop(tiny, examples, monkeypatch):
    _evaluations(monkeypatch, [9, 5, 4, 4.5, 4.25, 1])
    job = _job(tiny(), examples(8), examples(2), adapter={}, eval_every=1, early_stop_patience=2, max_steps=20)
    told = list(job.run())
    assert told[-1] == Stopped(step=4, reason="early stop")
    assert [e.is_best for e in told if isinstance(e, Evaluated)] == [False, True, True, False, False]
    assert (job.progress.best_step, job.progress.best_loss) == (2, 4)


def test_a_loss_that_is_no_number_is_never_the_best(tiny, examples, monkeypatch):
    nan = float("nan")
    _evaluations(monkeypatch, [nan, nan, 3, nan, 2])
    job = _job(tiny(), examples(8), examples(2), adapter={}, eval_every=1)
    told = [e.is_best for e in job.run() if isinstance(e, Evaluated)]
    assert told == [False, False, True, False, True]


def test_a_request_to_stop_ends_the_step_and_saves(tiny, examples, tmp_path):
    asked = []
    job = _job(tiny(), examples(8), adapter={}, folder=tmp_path, should_stop=lambda: len(asked) == 2, save_every=0)
    told = []
    for event in job.run():
        told.append(event)
        asked += [event] if isinstance(event, Stepped) else []
    assert told[-1] == Stopped(step=2, reason="interrupted")
    assert isinstance(told[-2], Saved) and (tmp_path / "checkpoints/step-00000002/state.json").is_file()


def test_a_request_to_stop_after_the_last_step_finds_it_done(tiny, examples, tmp_path):
    job = _job(tiny(), examples(8), adapter={}, max_steps=1, should_stop=lambda: True)
    assert list(job.run())[-1] == Stopped(step=1, reason="done")


def test_progress_counts_what_the_steps_say(tiny, examples):
    job = _job(tiny(), examples(10), adapter={}, max_steps=5)
    steps = _steps(job.run())
    assert job.progress == Progress(
        step=5,
        num_examples=sum(s.num_examples for s in steps),
        num_tokens=sum(s.num_tokens for s in steps),
        num_supervised=sum(s.num_supervised for s in steps),
        seconds=sum(s.seconds for s in steps),
    )


# --- the optimiser ---


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", [1 / 3, 2 / 3, *((1 + math.cos(math.pi * i / 8)) / 2 for i in range(8))]),
    ],
)
def test_learning_rates(schedule, wanted):
    rates = [learning_rate_at(s, peak=2.0, warmup=2, total=10, schedule=schedule) for s in range(10)]
    assert rates == pytest.approx([2 * w for w in wanted])


def test_warm_up_longer_than_the_run_and_none_at_all():
    assert [learning_rate_at(s, peak=1.0, warmup=9, total=3, schedule="cosine") for s in range(3)] == [0.1, 0.2, 0.3]
    assert learning_rate_at(0, peak=1.0, warmup=0, total=1, schedule="linear") == 1.0


def test_steps_use_the_schedule(tiny, examples):
    told, _ = _train(tiny(), examples(8), adapter={}, lr_scheduler="linear", warmup_steps=1, learning_rate=0.01)
    assert [s.learning_rate for s in _steps(told)] == pytest.approx([0.005, 0.01, 0.01 * 2 / 3, 0.01 / 3])


def _parameters(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return {n: torch.nn.Parameter(torch.randn(3, 2, generator=g).to(dtype)) for n in "ab"}


def test_clipping_shortens_to_the_limit_and_tells_the_length_before():
    parameters = _parameters()
    optimizer = AdamW(parameters, weight_decay=0.0)
    for limit, after in ((1.0, 1.0), (0.0, 60.0), (100.0, 60.0)):
        for p in parameters.values():
            p.grad = torch.full_like(p, 60 / math.sqrt(12))
        assert optimizer.clip(limit) == pytest.approx(60)
        assert torch.cat([g.flatten() for g in optimizer.gradients()]).norm().item() == pytest.approx(after, rel=1e-5)
    parameters["a"].grad[0, 0] = float("inf")
    assert optimizer.clip(1.0) == math.inf
    optimizer.drop_gradients()
    assert optimizer.clip(1.0) == 0.0


def test_steps_equal_torchs_adamw_with_decay():
    ours, theirs = _parameters(), _parameters()
    mine = AdamW(ours, weight_decay=0.1)
    twin = torch.optim.AdamW(theirs.values(), lr=0.0, weight_decay=0.1, foreach=False, fused=False)
    for step in range(4):
        twin.param_groups[0]["lr"] = 0.1 / (step + 1)
        for mine_p, twin_p in zip(ours.values(), theirs.values(), strict=True):
            mine_p.grad, twin_p.grad = mine_p.detach().clone(), twin_p.detach().clone()
        mine.step(0.1 / (step + 1))
        twin.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


def test_lora_plus_gives_b_a_learning_rate_of_its_own():
    start = {"x.lora_A": torch.ones(3), "x.lora_B": torch.ones(3), "bias": torch.ones(3)}
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = AdamW(parameters, weight_decay=0.0, b_ratio=16.0)
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    optimizer.step(1e-3)  # AdamW's first step is the learning rate itself
    moved = {name: float((start[name] - p).mean().detach()) for name, p in parameters.items()}
    assert moved == pytest.approx({"x.lora_A": 1e-3, "x.lora_B": 16e-3, "bias": 1e-3}, rel=1e-3)


def test_a_step_is_seen_by_what_is_cached_by_version():
    parameters = _parameters()
    before = [p._version for p in parameters.values()]
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    AdamW(parameters, weight_decay=0.0).step(0.1)
    assert all(p._version > v for p, v in zip(parameters.values(), before, strict=True))


def test_bfloat16_weights_move_by_updates_that_they_could_not_hold():
    parameters = {"w": torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))}
    optimizer = AdamW(parameters, weight_decay=0.0)
    for _ in range(200):
        parameters["w"].grad = torch.ones_like(parameters["w"])
        optimizer.step(2e-5)  # a bfloat16 at one moves by 4e-3 at least
    assert parameters["w"].dtype == torch.bfloat16
    torch.testing.assert_close(optimizer.state()["w/master"], torch.full((4,), 1 - 200 * 2e-5), rtol=0, atol=1e-5)
    assert (parameters["w"] < 1).all()


def test_optimizer_state_goes_through_a_file_and_back():
    def advance(optimizer, parameters, steps):
        for step in steps:
            for p in parameters.values():
                p.grad = torch.full_like(p, 0.1 * step)
            optimizer.step(0.01)

    whole, first, second = (_parameters(torch.bfloat16) for _ in range(3))
    advance(AdamW(whole, weight_decay=0.0), whole, range(6))
    one = AdamW(first, weight_decay=0.0)
    advance(one, first, range(3))
    two = AdamW(second, weight_decay=0.0)
    for name, p in second.items():
        p.data.copy_(first[name])
    two.load_state(one.state())
    advance(two, second, range(3, 6))
    assert all(torch.equal(whole[n], second[n]) for n in whole)
    with pytest.raises(KeyError):
        two.load_state({"c/exp_avg": torch.zeros(3, 2)})


def test_unmoved_names_the_factors_that_are_still_zero(tiny, examples):
    model = tiny()
    job = _job(model, examples(8), adapter={}, max_steps=1)
    named = [(n, p) for n, p in trainable_parameters(model).items()]
    assert len(unmoved(named)) == len(list(adapted_layers(model)))
    list(job.run())
    assert unmoved(named) == []
