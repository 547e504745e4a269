"""Who won, and how sure that is."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnntrain.sweep.ranking import contest, interval, rank
from cnntrain.sweep.study import Outcome, Trial


def trial(number: int, *values: float | None, status: str = "done", state: str = "ended") -> Trial:
    outcomes = {seed: Outcome(status, value) for seed, value in enumerate(values)}
    return Trial(number, {"model": str(number)}, outcomes, state)


def test_the_mean_over_seeds_decides() -> None:
    trials = [trial(0, 0.9, 0.5), trial(1, 0.8, 0.8), trial(2, 0.1, 0.2)]
    assert [s.trial.number for s in rank(trials, "max")] == [1, 0, 2]
    assert [s.trial.number for s in rank(trials, "min")] == [2, 0, 1]


def test_what_is_not_done_has_no_place() -> None:
    trials = [
        trial(0, None, status="diverged"), trial(1, 0.5, status="pruned"), trial(2, None, status="failed"),
        trial(3, 0.9, state="running"), trial(4, 0.1), trial(5), trial(6, None),
    ]  # fmt: skip
    mixed = Trial(7, {}, {0: Outcome("done", 0.9), 1: Outcome("killed")}, "ended")
    assert [s.trial.number for s in rank([*trials, mixed], "max")] == [4]


def test_students_t_from_its_table() -> None:
    """t(2) = 4.3027 and t(4) = 2.7764 at 95 %, two-sided (Student 1908; any textbook's table)."""
    low, high = interval([1.0, 2.0, 3.0]) or (0, 0)
    assert (low + high) / 2 == pytest.approx(2) and (high - low) / 2 == pytest.approx(
        4.3027 / math.sqrt(3), 1e-4
    )
    low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0]) or (0, 0)
    assert (high - low) / 2 == pytest.approx(2.7764 * statistics.stdev([1, 2, 3, 4, 5]) / math.sqrt(5), 1e-4)
    assert interval([1.0]) is None


def test_one_seed_has_no_spread() -> None:
    first, second = rank([trial(0, 0.9), trial(1, 0.8)], "max")
    assert first.std is None and first.low is None
    found = contest(first, second, "max")
    assert found.difference == pytest.approx(0.1) and found.clear is None


def test_pairing_over_seeds_takes_their_luck_out() -> None:
    """Two settings that both swing with the seed, one always a little better: clear. Unpaired it would not be."""
    first, second = rank([trial(0, 0.70, 0.80, 0.90), trial(1, 0.69, 0.79, 0.889)], "max")
    found = contest(first, second, "max")
    assert found.clear is True and found.low is not None and 0 < found.low < 0.0104
    first, second = rank([trial(0, 0.70, 0.80, 0.90), trial(1, 0.89, 0.69, 0.79)], "max")
    assert contest(first, second, "max").clear is False


def test_lower_is_better_where_it_is() -> None:
    first, second = rank([trial(0, 3.0, 3.1), trial(1, 1.0, 1.1)], "min")
    found = contest(first, second, "min")
    assert first.trial.number == 1 and found.difference == pytest.approx(2.0) and found.clear


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=6), st.floats(-1e3, 1e3))
def test_an_interval_moves_with_its_values(values: list[float], shift: float) -> None:
    low, high = interval(values) or (0, 0)
    moved = interval([value + shift for value in values]) or (0, 0)
    assert low <= statistics.fmean(values) + 1e-6 and high >= statistics.fmean(values) - 1e-6
    assert moved == pytest.approx((low + shift, high + shift), abs=1e-6)
