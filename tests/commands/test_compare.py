"""Runs side by side."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from cnntrain import compose, train
from cnntrain.cli import main
from cnntrain.errors import UserError
from cnntrain.report.compare import comparison_rows, differing_keys, find_runs, group_runs, read_run
from cnntrain.report.metrics import read_metrics

QUICK = ("data.limit=60", "batch_size=16", "threads=1", "log.figures=false", "log.tensorboard=false")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs: two settings, two seeds each."""
    folder = tmp_path_factory.mktemp("runs")
    for model in ("mlp", "lenet5"):
        for seed in (0, 1):
            name = folder / f"{model}-{seed}"
            train(compose(*QUICK, f"model={model}", f"seed={seed}", "epochs=2", f"run_dir={name}"))
    return folder


def test_runs_that_differ_in_seed_are_averaged(runs: Path) -> None:
    records = [read_run(place) for place in find_runs(runs)]
    assert len(records) == 4
    keys = differing_keys(records)
    assert keys == ["choices.model"]  # not the networks' own keys, which the choice brings along
    groups = group_runs(records, keys)
    assert [(group.name, len(group.runs)) for group in groups] == [("model=lenet5", 2), ("model=mlp", 2)]
    row = comparison_rows(groups, "top1", ("top1", "max"))[0]
    values = [run.results["best"]["val/top1"] for run in groups[0].runs]
    assert row["val/top1"] == pytest.approx(sum(values) / 2) and row["runs"] == 2
    assert row["val/top1 std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


def test_the_command_writes_a_table_and_a_figure(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs), "run_dir=c"]) == 0
    said = capsys.readouterr().out
    assert "lenet5" in said and "val/top1" in said
    with Path("c/compare.csv").open(newline="") as file:
        assert [row["model"] for row in csv.DictReader(file)] == ["lenet5", "mlp"]
    assert Path("c/curves.png").stat().st_size > 5000 and "curves.png" in Path("c/compare.md").read_text()
    assert main(["compare", str(runs / "mlp-0"), str(runs / "mlp-1"), "metric=loss", "run_dir=d"]) == 0
    assert "val/loss" in capsys.readouterr().out


def test_keys_that_vary_within_an_option_are_shown(runs: Path) -> None:
    train(compose(*QUICK, "model=mlp", "optimizer.lr=0.5", "epochs=1", "run_dir=other"))
    records = [read_run(place) for place in (*find_runs(runs), Path("other"))]
    assert differing_keys(records) == ["choices.model", "optimizer.lr", "epochs"]


def test_unfinished_runs_are_compared(runs: Path) -> None:
    place = Path("half")
    place.mkdir()
    for name in ("config.yaml", "metrics.csv"):
        (place / name).write_text((runs / "mlp-0" / name).read_text())
    row = comparison_rows(group_runs([read_run(place)], []), "top1", ("top1", "max"))[0]
    known = read_metrics(runs / "mlp-0" / "metrics.csv")
    assert row["val/top1"] == max(each["val/top1"] for each in known) and "parameters" not in row


def test_folders_without_a_run_are_rejected(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        find_runs(Path.cwd())
    assert main(["compare"]) == 2 and main(["compare", "nowhere"]) == 2
    assert main(["compare", str(runs), "metric=top11"]) == 2
    assert "did you mean 'top1'" in capsys.readouterr().err
    broken = Path("broken")
    broken.mkdir()
    (broken / "metrics.csv").write_text("epoch\n1\n")
    with pytest.raises(UserError, match=r"config\.yaml"):
        read_run(broken)
    (broken / "config.yaml").write_text("seed: 1\n")
    (broken / "results.json").write_text(json.dumps({"best": None})[:-1])
    with pytest.raises(UserError, match=r"results\.json"):
        read_run(broken)


def made_up(name: str, data: str | None = "9-a-b", **values: object) -> Path:
    folder = Path(name)
    folder.mkdir()
    config: dict[str, object] = {
        "seed": 0,
        "data": {"root": None, "fold": 0, "split_seed": 0},
        "choices": {"data": "x"},
    }
    for key, value in values.items():
        section, _, inner = key.partition("__")
        target = config[section] if inner else config
        assert isinstance(target, dict)
        target[inner or section] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.csv").write_text("epoch,step,val/top1\n1,5,0.5\n")
    if data:
        (folder / "run.json").write_text(json.dumps({"data": data}))
    return folder


def test_folds_are_averaged_like_seeds() -> None:
    records = [read_run(made_up(f"r{fold}", data__fold=fold, seed=fold % 2)) for fold in range(3)]
    records.append(read_run(made_up("other", data__fold=0, epochs=9)))
    assert [len(group.runs) for group in group_runs(records, differing_keys(records))] == [3, 1]


def test_moved_data_is_not_a_different_setting() -> None:
    here, moved = made_up("here", data__root="/a"), made_up("moved", data__root="/b")
    other, unknown = made_up("other", "9-a-c", data__root="/c"), made_up("unknown", None, data__root="/d")
    changed = made_up("changed", "9-a-d", data__root="/a")
    assert differing_keys([read_run(each) for each in (here, moved)]) == []
    assert differing_keys([read_run(each) for each in (here, other)]) == ["data.root"]
    assert differing_keys([read_run(each) for each in (here, unknown)]) == ["data.root"]
    assert differing_keys([read_run(each) for each in (here, changed)]) == ["data.fingerprint"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("results.json", b""),
        ("results.json", b"[]"),
        ("results.json", b'{"best": 5}'),
        ("results.json", b'{"test": {"test/top1": "high"}}'),
        ("run.json", b'{"da'),
        ("config.yaml", b"5"),
        ("config.yaml", b"a: [b"),
        ("metrics.csv", b"epoch,val/top1\n1,0.5\n\xff\xfe,1\n"),
    ],
)
def test_damaged_files_of_a_run_are_named(file: str, content: bytes) -> None:
    folder = made_up("run")
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=f"run/{file}"):
        read_run(folder)


@pytest.mark.parametrize(
    "line", ["a: !!bool x", "a: !!timestamp x", "a: !!int ''", "a: !!float ''", "seed2: 0x" + "f" * 8000]
)
def test_configs_that_yaml_cannot_construct_are_rejected(tmp_path: Path, line: str) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text("epoch,step,val/top1\n1,1,0.5\n")
        (tmp_path / name / "config.yaml").write_text(line + "\n")
    with pytest.raises(UserError, match=r"config\.yaml"):
        read_run(tmp_path / "one")
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 2


@pytest.mark.parametrize("value", ["inf", "1e308"])
def test_infinite_values_have_no_mean(tmp_path: Path, value: str) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(f"epoch,step,val/top1\n1,1,{value}\n")
        (tmp_path / name / "config.yaml").write_text("seed: 0\n")
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two"), "metric=top1"]) in (0, 2)


def test_linked_runs_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "metrics.csv").write_text("epoch,step\n1,1\n")
    (tmp_path / "sweep" / "0").mkdir(parents=True)
    (tmp_path / "sweep" / "0" / "metrics.csv").write_text("epoch,step\n1,1\n")
    (tmp_path / "sweep" / "1").symlink_to(tmp_path / "elsewhere")
    assert find_runs(tmp_path / "sweep") == [tmp_path / "sweep" / "0"]
