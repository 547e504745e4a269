"""How a sweep ends: the table, the winner and how sure that is, what mattered, and files that say it all again."""

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cnntrain.io.safe_files import write_text
from cnntrain.plots.figure import save_figure
from cnntrain.plots.learning_curves import learning_curves
from cnntrain.plots.sweep import Point, plot_marginal_effect, plot_parallel_coordinates
from cnntrain.report.compare import find_runs, read_run, write_csv
from cnntrain.report.table import markdown, value_text
from cnntrain.sweep.plan import SweepPlan, repeats_text, short
from cnntrain.sweep.ranking import RankedTrial, WinnerComparison, contest, rank
from cnntrain.sweep.search_space import SearchDimension
from cnntrain.sweep.study import Study, Trial
from cnntrain.sweep.sweep_progress import setting_name

log = logging.getLogger("cnntrain")
FEWEST_FOR_IMPORTANCE = 4  # settings


@dataclass
class SweepReport:
    """What a sweep found.

    Attributes:
        trials: all that have begun.
        standings: those that are done, the best first; empty where runs are not ranked.
        contest: comparison of the winner with the other trials.
        test: the winner's metrics on the test set, one row per repeat.
        importance: share of the variance between settings that a key explains by itself; a reason where that can't
            be told.
        pictures: files, relative to the sweep's folder.
    """

    plan: SweepPlan
    trials: list[Trial]
    standings: list[RankedTrial] = field(default_factory=list)
    contest: WinnerComparison | None = None
    test: list[dict[str, float]] = field(default_factory=list)
    importance: dict[str, float] | str = "not asked for"
    pictures: list[str] = field(default_factory=list)

    @property
    def metric(self) -> str:
        return f"val/{self.plan.monitor[0]}" if self.plan.monitor else ""


def make_report(plan: SweepPlan, study: Study) -> SweepReport:
    answer = SweepReport(plan, study.trials())
    if plan.monitor:
        how = plan.monitor[1], plan.monitor_range, plan.overlap
        answer.standings = rank(answer.trials, *how)
        if len(answer.standings) > 1:
            answer.contest = contest(answer.standings, *how)
        answer.importance = importance(plan, study, len(answer.standings))
    return answer


def importance(plan: SweepPlan, study: Study, settings: int) -> dict[str, float] | str:
    """Functional ANOVA of Hutter, Hoos and Leyton-Brown 2014: the share of the variance of the metric between settings
    that each key explains by itself; or why there is none."""
    from optuna.importance import FanovaImportanceEvaluator

    if len(plan.axes) < 2:
        return "needs at least two keys that vary"
    if settings < FEWEST_FOR_IMPORTANCE:
        return f"{settings} finished settings are too few"
    try:
        found = FanovaImportanceEvaluator(seed=0).evaluate(study.study)
    except (RuntimeError, ValueError) as error:  # e.g. the metric is the same everywhere
        return str(error).splitlines()[0]
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def run_rows(plan: SweepPlan, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """results.csv: one row a run."""
    rows = []
    for trial in trials:
        for repeat, outcome in sorted(trial.outcomes.items()):
            row = {"trial": trial.number, **trial.values, **repeat.values, "status": outcome.status}
            rows.append({**row, **outcome.figures, "time_s": outcome.time_s, "error": outcome.error})
    return rows


def ranking_rows(answer: SweepReport) -> list[dict[str, Any]]:
    """The settings, the best first; then those that have no place, with why."""
    rows = []
    for place, standing in enumerate(answer.standings, 1):
        row = {"place": place, **_settings(standing.trial), answer.metric: standing.mean}
        if len(answer.plan.repeats) > 1:
            limits = "–" if standing.low is None else f"{standing.low:.4g} to {standing.high:.4g}"
            row |= {"std": standing.std, "95 % interval": limits, "runs": len(standing.values)}
        rows.append({**row, **_figures(standing.trial, answer.metric), "trial": standing.trial.number})
    placed = {standing.trial.number for standing in answer.standings}
    for trial in (t for t in answer.trials if t.number not in placed):
        outcomes = list(trial.outcomes.values())
        status = ", ".join(dict.fromkeys(o.status for o in outcomes)) or "running"
        error = next((o.error for o in outcomes if o.error), None)
        row = {"place": None, **_settings(trial), **_figures(trial, answer.metric), "trial": trial.number}
        rows.append(row | {"status": status} | ({"error": error} if error else {}))
    if any("status" in row for row in rows):
        rows = [row if "status" in row else {**row, "status": "done"} for row in rows]
    return rows


def _settings(trial: Trial) -> dict[str, str]:
    return {key: short(value) for key, value in trial.values.items()}


def _figures(trial: Trial, metric: str) -> dict[str, Any]:
    """Return the means over the repeats of the other metrics shown in the table."""
    outcomes = list(trial.outcomes.values())
    row: dict[str, Any] = {}
    for key in dict.fromkeys(key for outcome in outcomes for key in outcome.figures):
        found = [o.figures[key] for o in outcomes if o.figures.get(key) is not None]
        if key == metric or not found:
            continue
        numbers = all(isinstance(value, int | float) for value in found)
        row[key] = statistics.fmean(found) if numbers else ", ".join(dict.fromkeys(map(str, found)))
    return row | ({"time_s": round(sum(o.time_s for o in outcomes), 1)} if outcomes else {})


def summary_lines(answer: SweepReport) -> list[str]:
    """The answer in words: the winner, whether its lead is more than chance, the test set, what mattered."""
    if not answer.standings:
        return ["no setting came to a figure to be ranked by"] if answer.plan.monitor else []
    best, metric = answer.standings[0], answer.metric
    name = setting_name(best.trial.values) or "the one setting"
    spread = "" if best.std is None else f" ± {best.std:.2g} over {repeats_text(best.values)}"
    lines = [f"best: {name}: {metric} {value_text(best.mean)}{spread}"]
    if answer.contest:
        lines[0] += (
            f"; this value is optimistic because it selected the best of {len(answer.standings)} settings"
        )
        lines.append(_contest_line(answer, answer.contest))
    if len(answer.plan.repeats) == 1 and len(answer.standings) > 1:
        lines.append("one seed a setting can't tell a lead from chance; sweep.seeds=3 can")
    if keys := answer.plan.other_examples:
        lines.append(f"settings differ in {', '.join(keys)}, so they may be validated on different images; ")
        lines[-1] += "metrics on different images cannot be compared"
    if answer.test:
        keys = [key for key in answer.test[0] if key.split("/")[-1] == metric.split("/")[-1]] or list(
            answer.test[0]
        )
        figure = _mean_text(answer.test, keys[0], repeats_text(best.values))
        lines.append(f"test set, used once, for the best setting only: {figure}")
    if isinstance(answer.importance, dict):
        parts = ", ".join(f"{key} {100 * share:.0f} %" for key, share in answer.importance.items())
        lines.append(f"share of the variance between settings that a key explains by itself: {parts}")
    else:
        lines.append(f"importance of the keys: not estimated: {answer.importance}")
    return lines


def _contest_line(answer: SweepReport, found: WinnerComparison) -> str:
    second = answer.standings[1]
    name = setting_name(second.trial.values)
    line = f"runner-up: {name}: {value_text(second.mean)}, worse by {found.difference:.2g}"
    if found.low is None or found.high is None:
        return line
    verdict = "difference larger than the spread over runs"
    if found.rival is not None:
        verdict = "no significant difference (within the spread over runs)"
        if found.rival > 2:
            third = setting_name(answer.standings[found.rival - 1].trial.values)
            verdict = "difference larger than the spread over runs; "
            verdict += f"no significant difference from {third} (place {found.rival})"
    chosen = f", corrected for selecting the best of {found.settings}" if found.settings > 2 else ""
    limits = f"95 %: {found.low:.2g} to {found.high:.2g}, paired over {repeats_text(found.repeats)}{chosen}"
    return f"{line} ({limits}): {verdict}"


def _mean_text(rows: Sequence[Mapping[str, float]], key: str, repeats: str) -> str:
    values = [row[key] for row in rows]
    spread = f" ± {statistics.stdev(values):.2g} over {repeats}" if len(values) > 1 else ""
    return f"{key} {value_text(statistics.fmean(values))}{spread}"


def draw(answer: SweepReport, folder: Path) -> list[str]:
    """The pictures, as far as there is something to draw; their names in the sweep's folder."""
    plan, points = answer.plan, _points(answer.standings)
    drawn: list[str] = []

    def keep(name: str, figure: Any) -> None:
        save_figure(figure, folder / "figures" / f"{name}.png")
        drawn.append(f"figures/{name}.png")

    if plan.monitor:
        groups: dict[str, list[Any]] = {}
        for run in _curves(folder):
            number = int(run.name.split("-")[0])
            trial = next((t for t in answer.trials if t.number == number), None)
            if trial is not None:
                groups.setdefault(setting_name(trial.values) or "all", []).append(read_run(run).rows)
        if groups:
            keep("curves", learning_curves(groups, plan.monitor[0]))
        axes: list[SearchDimension] = [a for a in plan.axes if len({s[a.key] for s, _ in points}) > 1]
        if len(points) > 1 and axes:
            keep("parallel", plot_parallel_coordinates(points, axes, answer.metric, plan.monitor[1]))
            for axis in axes:
                name = axis.key.replace("/", "_")
                keep(f"effect-{name}", plot_marginal_effect(points, axis, answer.metric, plan.monitor[1]))
    return drawn


def _curves(folder: Path) -> list[Path]:
    return find_runs(folder) if any(folder.glob("*/metrics.csv")) else []


def _points(standings: Sequence[RankedTrial]) -> list[Point]:
    return [(s.trial.values, s.mean) for s in standings if math.isfinite(s.mean)]


def write_csv_of_runs(folder: Path, plan: SweepPlan, trials: Sequence[Trial]) -> None:
    """results.csv, one row a run; written anew after each."""
    write_csv(folder / "results.csv", run_rows(plan, trials))


def write_report(answer: SweepReport, folder: Path, command: str, again: str | None) -> None:
    """results.md: the answer, the table, the pictures.

    Args:
        command: the sweep's.
        again: the command that trains the winner alone.
    """
    parts = [f"# Sweep\n\n```\n{command}\n```", "\n".join(f"- {line}" for line in summary_lines(answer))]
    if again:
        parts.append(f"Command to repeat a run of the best setting:\n\n```\n{again}\n```")
    parts.append(markdown(ranking_rows(answer)))
    parts += [f"![{Path(name).stem}]({name})" for name in answer.pictures]
    write_text(folder / "results.md", "\n\n".join(part for part in parts if part) + "\n", sync=False)
