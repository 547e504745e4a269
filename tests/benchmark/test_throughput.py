"""Tables of `cnntrain bench`."""

from dataclasses import replace

import pytest

from cnntrain.benchmark.throughput import Speed, load_line, part_rows, recommend, speed_rows

HERE = Speed("fp32", True, "off", 64, loop=100.0, bare=110.0, peak_mib=700.0, clean=5, windows=5)


def test_parts_add_up_to_the_total() -> None:
    seconds = {"step": 0.010, "metrics": 0.0105, "logging": 0.0104, "augment": 0.011, "data": 0.0125}
    *parts, total = part_rows(seconds, images=64)
    for column in ("ms per step", "share"):
        assert sum(float(str(row[column])) for row in parts) == pytest.approx(float(str(total[column])))
    assert total["ms per step"] == pytest.approx(64 * 12.5) and total["share"] == 1
    assert parts[0]["share"] == pytest.approx(0.8)
    assert float(str(parts[2]["share"])) < 0  # noise is not clipped


def test_share_is_relative_to_the_bare_step_and_missing_times_are_none() -> None:
    rows = speed_rows([HERE, Speed("bf16", True, "off", 64, note="out of memory")])
    assert rows[0]["share"] == pytest.approx(100 / 110, abs=1e-3)
    assert rows[0]["remark"] == "configured, fastest" and rows[0]["clean windows"] == "5 of 5"
    assert rows[1]["share"] is None and rows[1]["images/s"] is None and rows[1]["remark"] == "out of memory"


def test_recommendation_names_the_overrides() -> None:
    faster = replace(HERE, precision="bf16", loop=200.0)
    assert "precision=bf16: 2.00 times" in recommend([HERE, faster])
    assert recommend([HERE, replace(HERE, channels_last=False, loop=101.0)]).startswith("keep")
    larger = replace(faster, batch_size=128, loop=300.0)
    lines = recommend([HERE, faster, larger]).splitlines()
    assert lines[1].startswith("batch_size=128 ") and "1.50" in lines[1] and "optimizer.lr" in lines[1]
    assert recommend([HERE, replace(HERE, loop=None)]).startswith("no recommendation")
    assert recommend([replace(HERE, loop=None)]).startswith("no recommendation")


def test_load_of_other_processes_is_reported() -> None:
    assert load_line(30, 30, 0.05).startswith("no load")
    assert "4 of 30" in load_line(26, 30, 1.2) and "1.2 cores" in load_line(26, 30, 1.2)
