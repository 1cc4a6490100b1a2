"""The learning-rate range test: a suggestion, and no trace."""

import pytest

from deltaw.errors import UserError
from deltaw.train.find_lr import HIGHEST, LOWEST, NUM_STEPS, find_learning_rate, rate_at, suggest


def test_rates_rise_evenly_from_lowest_to_highest():
    rates = [rate_at(step) for step in range(NUM_STEPS)]
    assert rates[0] == pytest.approx(LOWEST) and rates[-1] == pytest.approx(HIGHEST)
    assert rates[31] / rates[30] == pytest.approx(rates[1] / rates[0])


def test_a_small_model_gets_a_suggestion_and_nothing_is_written(options, tmp_path):
    given = options(eval_data=None)
    before = sorted(p.name for p in tmp_path.iterdir())
    found = find_learning_rate(given)
    assert LOWEST < found.suggestion < HIGHEST
    assert found.suggestion > 1e-4  # below, sixty steps move nothing
    assert [rate for rate, _ in found.curve] == pytest.approx([rate_at(i) for i in range(len(found.curve))])
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_the_steepest_fall_is_suggested():
    curve = [(rate_at(i), 5.0 if i < 30 else 5.0 - 0.2 * (i - 30) if i < 40 else 3.0 + (i - 40)) for i in range(50)]
    assert rate_at(28) < suggest(curve).suggestion < rate_at(38)


@pytest.mark.parametrize("curve", [[], [(1e-6, 2.0)], [(rate_at(i), 2.0 + i) for i in range(20)]])
def test_a_loss_that_never_falls_has_no_suggestion(curve):
    with pytest.raises(UserError, match="did not fall at any learning rate; check the data with --preview"):
        suggest(curve)
