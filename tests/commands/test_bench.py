"""`cnntrain bench` as it is called."""

import json
from pathlib import Path

from cnntrain.cli import main


def test_bench_leaves_one_folder_with_what_it_found(capsys) -> None:
    command = ["bench", "bench.budget_s=1", "threads=1", "data.limit=300", "batch_size=16", "run_dir=bench"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "where the time of the configured step goes (16 images)" in said and "the machine was" in said
    assert sorted(path.name for path in Path().rglob("*") if path.is_file()) == [
        ".lock",
        "bench.json",
        "run.json",
    ]
    report = json.loads(Path("bench/bench.json").read_text())
    configured = report["settings"][0]
    assert configured["loop"] > 0 and configured["bare"] > 0 and configured["peak_mib"] > 100
    assert abs(sum(row["share"] for row in report["parts"][:-1]) - 1) < 1e-9
    assert main(["bench", "model"]) == 2
