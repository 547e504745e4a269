"""Expected results of experiments. Comparisons of runs are tested in tests/commands/test_compare.py."""

import pytest

from cnntrain.errors import UserError
from cnntrain.report.compare import NEUTRAL, NEUTRAL_SECTIONS, judge_expectations
from cnntrain.train.resume import change_rule


def test_expectations() -> None:
    results = {"parameters": 10, "best": {"val/top1": 0.9}, "test": {"test/top1": 0.94}}
    expected = {"parameters": 10, "test/top1": ">=0.935", "val/top1": ">0.95"}
    verdicts = [f.verdict for f in judge_expectations(expected, results, ["seed", "data.root", "choices.data"])]
    assert verdicts == ["PASS", "PASS", "FAIL"]
    assert {f.verdict for f in judge_expectations(expected, results, ["epochs"])} == {"SKIP"}
    neutral = ["check.first", "data.scan", "bench.budget_s", "launch.timeout_s", "sweep.jobs"]
    assert "SKIP" not in {f.verdict for f in judge_expectations(expected, results, neutral)}
    with pytest.raises(UserError, match=r"expect\.x"):
        judge_expectations({"x": "about 3"}, results, [])


def test_settings_that_do_not_change_results_may_change_at_a_resume() -> None:
    assert {change_rule(key) for key in NEUTRAL - {"seed"} | NEUTRAL_SECTIONS} == {"free"}
