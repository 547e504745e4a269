"""Expected results of experiments. Comparisons of runs are tested in tests/commands/test_compare.py."""

import pytest

from cnntrain.errors import UserError
from cnntrain.report.compare import judge_expectations


def test_expectations() -> None:
    results = {"parameters": 10, "best": {"val/top1": 0.9}, "test": {"test/top1": 0.94}}
    expected = {"parameters": 10, "test/top1": ">=0.935", "val/top1": ">0.95"}
    verdicts = [f.verdict for f in judge_expectations(expected, results, ["seed", "data.root", "choices.data"])]
    assert verdicts == ["PASS", "PASS", "FAIL"]
    assert {f.verdict for f in judge_expectations(expected, results, ["epochs"])} == {"SKIP"}
    with pytest.raises(UserError, match=r"expect\.x"):
        judge_expectations({"x": "about 3"}, results, [])
