"""`cnntrain bench` from the command line."""

import json
from pathlib import Path

from cnntrain.cli import main


def test_bench_writes_one_run_folder_and_prints_two_tables(capsys) -> None:
    command = ["bench", "bench.budget_s=1", "threads=1", "data.limit=300", "batch_size=16", "run_dir=bench"]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "images/s on cpu" in output and "(16 images)" in output and "timing windows" in output
    assert sorted(path.name for path in Path().rglob("*") if path.is_file()) == [".lock", "bench.json", "run.json"]
    report = json.loads(Path("bench/bench.json").read_text())
    configured = report["settings"][0]
    assert configured["loop"] > 0 and configured["bare"] > 0 and configured["peak_mib"] > 100
    assert abs(sum(row["share"] for row in report["parts"][:-1]) - 1) < 1e-9
    assert main(["bench", "model"]) == 2
