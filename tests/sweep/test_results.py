"""Ranking of settings, and the comparison of the winner with the others."""

import math
import statistics

import numpy
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from cnntrain.sweep.plan import Repeat
from cnntrain.sweep.results import WinnerComparison, compare_winner, confidence_interval, rank_trials
from cnntrain.sweep.study import Outcome, Trial


def trial(number: int, *values: float | None, status: str = "done", is_finished: bool = True) -> Trial:
    outcomes = {Repeat(seed): Outcome(status, value) for seed, value in enumerate(values)}
    return Trial(number, {"model": str(number)}, outcomes, is_finished)


def is_significant(comparison: WinnerComparison) -> bool:
    """Return True if the winner is significantly better than every other setting."""
    return comparison.interval is not None and comparison.tied_rank is None


def test_settings_are_ranked_by_their_mean() -> None:
    trials = [trial(0, 0.9, 0.5), trial(1, 0.8, 0.8), trial(2, 0.1, 0.2)]
    assert [s.trial.number for s in rank_trials(trials, "max")] == [1, 0, 2]
    assert [s.trial.number for s in rank_trials(trials, "min")] == [2, 0, 1]


def test_settings_without_a_complete_result_are_not_ranked() -> None:
    trials = [
        trial(0, None, status="diverged"),
        trial(1, 0.5, status="pruned"),
        trial(2, None, status="failed"),
        trial(3, 0.9, is_finished=False),
        trial(4, 0.1),
        trial(5),
        trial(6, None),
    ]
    mixed = Trial(7, {}, {Repeat(0): Outcome("done", 0.9), Repeat(1): Outcome("killed")}, True)
    assert [s.trial.number for s in rank_trials([*trials, mixed], "max")] == [4]


def test_the_interval_is_that_of_students_t() -> None:
    """t(2) = 4.3027 and t(4) = 2.7764 at 95 %, two-sided (Student 1908; any textbook's table)."""
    low, high = confidence_interval([1.0, 2.0, 3.0]) or (0, 0)
    assert (low + high) / 2 == pytest.approx(2) and (high - low) / 2 == pytest.approx(4.3027 / math.sqrt(3), 1e-4)
    low, high = confidence_interval([1.0, 2.0, 3.0, 4.0, 5.0]) or (0, 0)
    assert (high - low) / 2 == pytest.approx(2.7764 * statistics.stdev([1, 2, 3, 4, 5]) / math.sqrt(5), 1e-4)
    assert confidence_interval([1.0]) is None


def test_one_seed_has_no_interval() -> None:
    first, second = rank_trials([trial(0, 0.9), trial(1, 0.8)], "max")
    assert first.std is None and first.interval is None
    comparison = compare_winner([first, second], "max")
    assert comparison.difference == pytest.approx(0.1) and not is_significant(comparison)


def test_comparisons_are_paired_over_seeds() -> None:
    """One of two settings that vary with the seed is always slightly better: significant only if paired."""
    first, second = rank_trials([trial(0, 0.70, 0.80, 0.90), trial(1, 0.69, 0.79, 0.889)], "max")
    comparison = compare_winner([first, second], "max")
    assert is_significant(comparison) and comparison.interval is not None and 0 < comparison.interval[0] < 0.0104
    first, second = rank_trials([trial(0, 0.70, 0.80, 0.90), trial(1, 0.89, 0.69, 0.79)], "max")
    assert not is_significant(compare_winner([first, second], "max"))


def test_lower_is_better_with_mode_min() -> None:
    first, second = rank_trials([trial(0, 3.0, 3.1), trial(1, 1.0, 1.1)], "min")
    comparison = compare_winner([first, second], "min")
    assert first.trial.number == 1 and comparison.difference == pytest.approx(2.0) and is_significant(comparison)


def test_folds_are_averaged_over_their_seeds_and_overlap() -> None:
    """Nadeau and Bengio 2003: the variance of the mean of k folds is (1 / k + 1 / (k - 1)) of the folds' variance."""
    values = {(0, 0): 0.5, (1, 0): 0.7, (0, 1): 0.8, (1, 1): 0.8, (0, 2): 0.4, (1, 2): 0.6}  # (seed, fold)
    outcomes = {Repeat(seed, fold): Outcome("done", value) for (seed, fold), value in values.items()}
    (comparison,) = rank_trials([Trial(0, {}, outcomes, True)], "max", overlap=1 / 2)
    folds = numpy.array([0.6, 0.8, 0.5])
    half = scipy.stats.t.ppf(0.975, 2) * folds.std(ddof=1) * math.sqrt(1 / 3 + 1 / 2)
    assert comparison.mean == pytest.approx(folds.mean()) and comparison.std == pytest.approx(
        numpy.std(list(values.values()), ddof=1)
    )
    assert comparison.interval == pytest.approx((folds.mean() - half, folds.mean() + half))


def test_the_interval_of_a_fraction_is_computed_on_the_logit_scale() -> None:
    values = [0.9861, 0.9917, 0.9944]
    mean, error = numpy.mean(values), scipy.stats.sem(values)
    half = scipy.stats.t.ppf(0.975, 2) * error / (mean * (1 - mean))
    expected = scipy.special.expit(scipy.special.logit(mean) + numpy.array([-half, half]))
    assert confidence_interval(values, (0, 1)) == pytest.approx(tuple(expected))
    _, high = confidence_interval(values, (0, 1)) or (0, 2)
    assert high < 1 < mean + scipy.stats.t.ppf(0.975, 2) * error  # the interval on the original scale exceeds 1


def test_the_interval_of_an_error_stays_above_zero() -> None:
    values = [0.01, 0.05, 0.09]
    half = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(values) / 0.05
    assert confidence_interval(values, (0, math.inf)) == pytest.approx((0.05 * math.exp(-half), 0.05 * math.exp(half)))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_the_interval_of_a_fraction_stays_between_0_and_1(values: list[float]) -> None:
    low, high = confidence_interval(values, (0, 1)) or (-1, 2)
    assert -1e-12 <= low <= statistics.fmean(values) + 1e-9 and statistics.fmean(values) - 1e-9 <= high <= 1 + 1e-12


def test_equal_values_have_no_interval() -> None:
    (comparison,) = rank_trials([trial(0, 1.0, 1.0, 1.0)], "max", (0, 1))
    assert comparison.std == 0 and comparison.interval is None


def test_differences_of_fractions_stay_between_minus_1_and_1() -> None:
    comparison = compare_winner(rank_trials([trial(0, 1.0, 0.2), trial(1, 0.1, 0.9)], "max"), "max", (0, 1))
    assert comparison.interval == (-1, 1)


def test_the_winner_is_compared_with_every_other_setting() -> None:
    """The runner-up is clearly worse; the third varies more and may be as good."""
    trials = [trial(0, 0.9, 0.91, 0.92), trial(1, 0.85, 0.86, 0.871), trial(2, 0.99, 0.6, 0.9)]
    comparison = compare_winner(rank_trials(trials, "max"), "max", (0, 1))
    assert comparison.interval is not None and comparison.interval[0] > 0 and comparison.tied_rank == 3


def test_equal_settings_rarely_have_a_significant_winner() -> None:
    """With 8 equal settings and 3 seeds each, at most 2.5 % of sweeps may find a significant winner."""
    random = numpy.random.default_rng(0)
    wrong, uncorrected, sweeps = 0, 0, 200
    for _ in range(sweeps):
        values = random.normal(0.9, 0.01, (8, 3)) + random.normal(0, 0.01, 3)
        ranking = rank_trials([trial(number, *row) for number, row in enumerate(values.tolist())], "max")
        wrong += is_significant(compare_winner(ranking, "max"))
        uncorrected += is_significant(compare_winner([ranking[0], ranking[-1]], "max"))
    assert wrong <= 0.025 * sweeps
    assert uncorrected > 0.1 * sweeps  # the best and the worst of eight, compared as if there were two


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=6), st.floats(-1e3, 1e3))
def test_the_interval_moves_with_its_values(values: list[float], shift: float) -> None:
    low, high = confidence_interval(values) or (0, 0)
    moved = confidence_interval([value + shift for value in values]) or (0, 0)
    assert low <= statistics.fmean(values) + 1e-6 and high >= statistics.fmean(values) - 1e-6
    assert moved == pytest.approx((low + shift, high + shift), abs=1e-6)
