"""Results of a sweep: ranking, comparison of the winner, importance of the keys, and the files of the sweep's folder.

Repeats of a trial differ in the seed, and in cross-validation also in the split. Runs on the same split are averaged
first; the intervals are for the mean over splits. Training sets of different splits overlap, so the variance of this
mean is larger than for independent runs. Nadeau and Bengio 2003 (Inference for the generalization error, Machine
Learning 52) correct for this by adding (validation examples / training examples) to the factor 1 / n.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cnntrain.io.safe_files import write_csv, write_text
from cnntrain.plots.curves import plot_learning_curves
from cnntrain.plots.figure import save_figure
from cnntrain.plots.sweep import Scale, plot_marginal_effect, plot_parallel_coordinates
from cnntrain.report.compare import find_runs, read_run
from cnntrain.report.console import format_value, markdown
from cnntrain.sweep.plan import UNLIMITED, Repeat, SweepPlan, repeats_text, rounded, trial_name
from cnntrain.sweep.study import Study, Trial

CONFIDENCE = 0.95
MIN_TRIALS_FOR_IMPORTANCE = 4
Range = tuple[float, float]


@dataclass(frozen=True)
class RankedTrial:
    """A completed trial in the ranking.

    Attributes:
        mean: mean of the metric over the runs.
        std: sample standard deviation over the runs (n - 1); None for one run.
        interval: 95 % confidence interval of the mean (see `confidence_interval`); None if the runs do not differ. It
            covers the variation between repeats: initial weights, order of images, augmentation, and the split if it
            varies. Otherwise all runs use the same validation images.
        values: metric by repeat.
    """

    trial: Trial
    mean: float
    std: float | None
    interval: Range | None
    values: dict[Repeat, float]


@dataclass(frozen=True)
class WinnerComparison:
    """Comparison of the winner with the runner-up.

    Attributes:
        difference: how much better the winner is, >= 0.
        interval: paired Student's t interval of the difference over the repeats of both; None for fewer than two. The
            95 % confidence holds simultaneously for the winner against every other trial.
        repeats: the repeats that both have.
        tied_rank: rank of the first trial that is not significantly worse than the winner; None if there is none.
    """

    difference: float
    interval: Range | None
    repeats: list[Repeat]
    tied_rank: int | None


def rank_trials(
    trials: Sequence[Trial], mode: str, limits: Range = UNLIMITED, overlap: float = 0.0
) -> list[RankedTrial]:
    """Rank the trials whose runs all completed, the best first; ties in the order of their numbers.

    Args:
        mode: `max` or `min`: which values of the metric are better.
        limits: the lowest and highest value of the metric.
        overlap: ratio of validation to training examples if repeats use different splits, else 0.
    """
    ranking = []
    for trial in trials:
        completed = trial.is_finished and {o.status for o in trial.outcomes.values()} == {"done"}
        if trial.mean is None or not completed:
            continue
        values = {repeat: o.value for repeat, o in sorted(trial.outcomes.items()) if o.value is not None}
        std = statistics.stdev(values.values()) if len(values) > 1 else None
        interval = confidence_interval(_by_split(values), limits, overlap) if std else None
        ranking.append(RankedTrial(trial, trial.mean, std, interval, values))
    sign = -1 if mode == "max" else 1
    return sorted(ranking, key=lambda ranked: (sign * ranked.mean, ranked.trial.number))


def compare_winner(
    ranking: Sequence[RankedTrial], mode: str, limits: Range = UNLIMITED, overlap: float = 0.0
) -> WinnerComparison:
    """Compare the winner with all other trials, paired over the repeats that both have.

    The winner is selected and compared on the same data. The intervals are therefore Bonferroni-corrected: with K
    trials, each has an error rate of 5 % / (K - 1). The probability of declaring a wrong winner is then at most
    2.5 %: there are at most K - 1 wrong trials, and for each the comparison with the truly best one must fail.

    Args:
        ranking: the best first; at least two.
    """
    winner, *others = ranking
    sign = 1 if mode == "max" else -1
    confidence = 1 - (1 - CONFIDENCE) / len(others)
    max_difference = limits[1] - limits[0]
    pairs: list[tuple[list[Repeat], Range | None]] = []
    for other in others:
        repeats = [repeat for repeat in winner.values if repeat in other.values]
        differences = {repeat: sign * (winner.values[repeat] - other.values[repeat]) for repeat in repeats}
        interval = confidence_interval(_by_split(differences), overlap=overlap, confidence=confidence)
        if interval:
            interval = max(interval[0], -max_difference), min(interval[1], max_difference)
        pairs.append((repeats, interval))
    tied = (rank for rank, (_, each) in enumerate(pairs, 2) if each is None or each[0] <= 0)
    repeats, interval = pairs[0]
    return WinnerComparison(sign * (winner.mean - others[0].mean), interval, repeats, next(tied, None))


def _by_split(values: Mapping[Repeat, float]) -> list[float]:
    """Return the independent samples: the runs if there is one split; the mean of each split if there are several."""
    splits: dict[object, list[float]] = {}
    for repeat, value in values.items():
        splits.setdefault(repeat.split, []).append(value)
    return list(values.values()) if len(splits) == 1 else [statistics.fmean(each) for each in splits.values()]


def confidence_interval(
    values: Sequence[float], limits: Range = UNLIMITED, overlap: float = 0.0, confidence: float = CONFIDENCE
) -> Range | None:
    """Return the Student's t confidence interval of a mean; None for fewer than two values.

    The interval of a bounded metric is computed on an unbounded scale (logit for two limits, log for one), with the
    standard error from the delta method, so that it stays within the limits. For the mean of 3 values from a beta
    distribution (mean 0.97, standard deviation 0.03) its coverage is 94 % (40,000 draws). The coverage of the interval
    on the original scale, clipped at 1, is 88 %.

    Args:
        limits: lower and upper bound of the metric.
        overlap: ratio of validation to training examples (see the module docstring).
        confidence: confidence level.
    """
    from scipy.special import stdtrit

    n = len(values)
    if n < 2:
        return None
    mean, (low, high) = statistics.fmean(values), limits
    error = statistics.stdev(values) * math.sqrt(1 / n + overlap)
    half = float(stdtrit(n - 1, 0.5 + confidence / 2)) * error
    if math.isinf(low) or half == 0 or not low < mean < high:
        return mean - half, mean + half
    if math.isinf(high):
        factor = math.exp(half / (mean - low))
        return low + (mean - low) / factor, low + (mean - low) * factor
    share = (mean - low) / (high - low)
    odds, factor = share / (1 - share), math.exp(half / (high - low) / (share * (1 - share)))
    ends = odds / factor, odds * factor
    return tuple(low + (high - low) * each / (1 + each) for each in ends)  # pyright: ignore[reportReturnType]


@dataclass
class SweepReport:
    """Results of a sweep.

    Attributes:
        trials: all that have started.
        ranking: completed trials, the best first; empty if runs are not ranked.
        comparison: the winner compared with the other trials; None for fewer than two.
        test: the winner's metrics on the test set, one row per repeat.
        importance: share of the variance between trials that each key explains by itself; or the reason why it is
            unknown.
        figures: files, relative to the sweep's folder.
    """

    plan: SweepPlan
    trials: list[Trial]
    ranking: list[RankedTrial] = field(default_factory=list)
    comparison: WinnerComparison | None = None
    test: list[dict[str, float]] = field(default_factory=list)
    importance: dict[str, float] | str = "not computed"
    figures: list[str] = field(default_factory=list)


def make_report(study: Study) -> SweepReport:
    """Rank the trials, compare the winner and compute the importance of the keys."""
    plan, report = study.plan, SweepReport(study.plan, study.trials())
    if plan.monitor:
        arguments = plan.monitor[1], plan.monitor_range, plan.overlap
        report.ranking = rank_trials(report.trials, *arguments)
        if len(report.ranking) > 1:
            report.comparison = compare_winner(report.ranking, *arguments)
        report.importance = _key_importance(study, len(report.ranking))
    return report


def _key_importance(study: Study, num_ranked: int) -> dict[str, float] | str:
    """Return the share of the variance between trials that each key explains by itself, or why it is unknown.

    The variance of the metric is decomposed by functional ANOVA (Hutter, Hoos and Leyton-Brown 2014).
    """
    from optuna.importance import FanovaImportanceEvaluator

    if len(study.plan.dimensions) < 2:
        return "needs at least two keys that vary"
    if num_ranked < MIN_TRIALS_FOR_IMPORTANCE:
        return f"{num_ranked} finished trials are too few"
    try:
        shares = FanovaImportanceEvaluator(seed=0).evaluate(study.study)
    except (RuntimeError, ValueError) as error:  # e.g. all trials have the same metric
        return str(error).splitlines()[0]
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def ranking_rows(report: SweepReport) -> list[dict[str, Any]]:
    """Return the rows of the table: ranked trials, the best first, then the others with their status."""
    rows = []
    for place, ranked in enumerate(report.ranking, 1):
        row = {"place": place, **rounded(ranked.trial.values), report.plan.metric: ranked.mean}
        if len(report.plan.repeats) > 1:
            interval = "{:.4g} to {:.4g}".format(*ranked.interval) if ranked.interval else "–"
            row |= {"std": ranked.std, "95 % interval": interval, "runs": len(ranked.values)}
        rows.append({**row, **_mean_metrics(ranked.trial, report.plan.metric), "trial": ranked.trial.number})
    ranked_numbers = {ranked.trial.number for ranked in report.ranking}
    unranked = [trial for trial in report.trials if trial.number not in ranked_numbers]
    if unranked:
        rows = [{**row, "status": "done"} for row in rows]
    for trial in unranked:
        outcomes = list(trial.outcomes.values())
        status = ", ".join(dict.fromkeys(o.status for o in outcomes)) or "running"
        error = next((o.error for o in outcomes if o.error), None)
        row = {"place": None, **rounded(trial.values), **_mean_metrics(trial, report.plan.metric)}
        row |= {"trial": trial.number, "status": status}
        rows.append(row | ({"error": error} if error else {}))
    return rows


def _mean_metrics(trial: Trial, metric: str) -> dict[str, Any]:
    """Return the means over the repeats of the metrics other than `metric`, and the total time."""
    outcomes = list(trial.outcomes.values())
    row: dict[str, Any] = {}
    for key in dict.fromkeys(key for outcome in outcomes for key in outcome.metrics):
        values = [o.metrics[key] for o in outcomes if o.metrics.get(key) is not None]
        if key == metric or not values:
            continue
        numeric = all(isinstance(value, int | float) for value in values)
        row[key] = statistics.fmean(values) if numeric else ", ".join(dict.fromkeys(map(str, values)))
    return row | ({"time_s": round(sum(o.time_s for o in outcomes), 1)} if outcomes else {})


def summary_lines(report: SweepReport) -> list[str]:
    """Describe the winner, whether its lead is significant, its test metrics, and the importance of the keys."""
    if not report.ranking:
        return ["no trial completed with a metric"] if report.plan.monitor else []
    best, metric = report.ranking[0], report.plan.metric
    repeats = repeats_text(best.values)
    spread = "" if best.std is None else f" ± {best.std:.2g} over {repeats}"
    name = trial_name(best.trial.values)
    lines = [f"best: {name}: {metric} {format_value(best.mean)}{spread}"]
    if report.comparison:
        count = len(report.ranking)
        lines[0] += f"; this value is optimistic because it is the best of {count} trials"
        lines.append(_comparison_line(report, report.comparison))
        if len(report.plan.repeats) == 1:
            lines.append("one seed per trial cannot show whether the lead is significant; use sweep.seeds=3")
    if keys := report.plan.swept_validation_keys:
        lines.append(
            f"trials differ in {', '.join(keys)}, so they may be validated on different images; "
            "metrics on different images cannot be compared"
        )
    if report.test:
        keys = list(report.test[0])
        key = next((key for key in keys if key.split("/")[-1] == metric.split("/")[-1]), keys[0])
        values = [row[key] for row in report.test]
        spread = f" ± {statistics.stdev(values):.2g} over {repeats}" if len(values) > 1 else ""
        mean = format_value(statistics.fmean(values))
        lines.append(f"test set, used once, for the best trial only: {key} {mean}{spread}")
    if isinstance(report.importance, dict):
        parts = ", ".join(f"{key} {100 * share:.0f} %" for key, share in report.importance.items())
        lines.append(f"share of the variance between trials that a key explains by itself: {parts}")
    else:
        lines.append(f"importance of the keys not estimated: {report.importance}")
    return lines


def _comparison_line(report: SweepReport, comparison: WinnerComparison) -> str:
    second = report.ranking[1]
    name = trial_name(second.trial.values)
    line = f"runner-up: {name}: {format_value(second.mean)}, worse by {comparison.difference:.2g}"
    if comparison.interval is None:
        return line
    verdict = "difference larger than the spread over runs"
    if comparison.tied_rank == 2:
        verdict = "no significant difference (within the spread over runs)"
    elif comparison.tied_rank is not None:
        tied = trial_name(report.ranking[comparison.tied_rank - 1].trial.values)
        verdict += f"; no significant difference from {tied} (place {comparison.tied_rank})"
    count = len(report.ranking)
    correction = f", corrected for selecting the best of {count}" if count > 2 else ""
    interval = "{:.2g} to {:.2g}".format(*comparison.interval)
    paired = f"paired over {repeats_text(comparison.repeats)}"
    return f"{line} (95 %: {interval}, {paired}{correction}): {verdict}"


def draw_figures(report: SweepReport, folder: Path) -> list[str]:
    """Draw learning curves, parallel coordinates and marginal effects; return their paths in the sweep's folder."""
    if not report.plan.monitor:
        return []
    metric, mode = report.plan.monitor
    paths: list[str] = []

    def add(name: str, figure: Any) -> None:
        paths.append(f"figures/{name}.png")
        save_figure(figure, folder / paths[-1])

    names = {trial.number: trial_name(trial.values) for trial in report.trials}
    groups: dict[str, list[Any]] = {}
    for run in find_runs(folder) if any(folder.glob("*/metrics.csv")) else []:
        number = int(run.name.split("-")[0])
        if number in names:
            groups.setdefault(names[number], []).append(read_run(run).rows)
    if groups:
        add("curves", plot_learning_curves(groups, metric))
    points = [(r.trial.values, r.mean) for r in report.ranking if math.isfinite(r.mean)]
    scales = []
    for each in report.plan.dimensions:
        used = {values[each.key] for values, _ in points}
        if len(used) > 1:
            names = [value for value in each.values if value in used]
            scales.append(Scale(each.key, names, (each.low or 0.0, each.high or 0.0), each.log))
    if scales:
        add("parallel", plot_parallel_coordinates(points, scales, report.plan.metric, mode))
    for scale in scales:
        name = scale.key.replace("/", "_")
        add(f"effect-{name}", plot_marginal_effect(points, scale, report.plan.metric, mode))
    return paths


def write_results_csv(folder: Path, trials: Sequence[Trial]) -> None:
    """Write results.csv with one row per run; it is rewritten after each run."""
    rows = [
        {"trial": trial.number, **trial.values, **repeat.values, "status": outcome.status}
        | {**outcome.metrics, "time_s": outcome.time_s, "error": outcome.error}
        for trial in trials
        for repeat, outcome in sorted(trial.outcomes.items())
    ]
    write_csv(folder / "results.csv", rows)


def write_report(report: SweepReport, folder: Path, command: str, winner_command: str | None) -> None:
    """Write results.md: summary, table and figures.

    Args:
        command: command line of the sweep.
        winner_command: command line that executes a run of the best trial alone.
    """
    parts = [f"# Sweep\n\n```\n{command}\n```", "\n".join(f"- {line}" for line in summary_lines(report))]
    if winner_command:
        parts.append(f"Command to repeat a run of the best trial:\n\n```\n{winner_command}\n```")
    parts.append(markdown(ranking_rows(report)))
    parts += [f"![{Path(name).stem}]({name})" for name in report.figures]
    write_text(folder / "results.md", "\n\n".join(part for part in parts if part) + "\n", sync=False)
