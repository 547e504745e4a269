"""Damaged, malicious and unsuitable checkpoints are rejected with a short message and run no code."""

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cnntrain.train import checkpoint

pytestmark = pytest.mark.slow

LAST = Path("run/checkpoints/last.pt")


class Malicious:
    """Creates a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("touched",)


def flip_a_byte() -> None:
    content = bytearray(LAST.read_bytes())
    with zipfile.ZipFile(LAST) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 1
    LAST.write_bytes(content)


def keep_only_the_format() -> None:
    torch.save({"format": checkpoint.FORMAT, "state": {"model": {}}, "config": {}, "spec": {}}, LAST)


def remove_moments() -> None:
    saved = torch.load(LAST, weights_only=True)
    saved["state"]["optimizer"]["state"] = {}
    torch.save(saved, LAST)


DAMAGE: dict[str, Callable[[], object]] = {
    "a flipped byte": flip_a_byte,
    "half a file": lambda: LAST.write_bytes(LAST.read_bytes()[: LAST.stat().st_size // 2]),
    "a web page": lambda: LAST.write_text("<html><body>404 Not Found</body></html>"),
    "a pickle": lambda: LAST.write_bytes(pickle.dumps(Malicious())),
    "a pickle in a checkpoint": lambda: torch.save({"format": checkpoint.FORMAT, "state": Malicious()}, LAST),
    "only the format": keep_only_the_format,
    "no moments": remove_moments,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_rejected_and_runs_no_code(cnntrain, trained: Path, how: str) -> None:
    DAMAGE[how]()
    said = cnntrain.refused(*cnntrain.quick, "run_dir=run", "resume=auto")
    assert str(LAST) in said and not Path("touched").exists()


def test_weights_with_nan_are_not_evaluated(cnntrain, trained: Path) -> None:
    saved = torch.load(LAST, weights_only=True)
    name = next(iter(saved["state"]["model"]))
    saved["state"]["model"][name].view(-1)[0] = float("nan")
    torch.save(saved, LAST)
    done = cnntrain("evaluate", f"checkpoint={LAST}", "threads=1", code=3)
    assert f"{name} contains NaN or inf" in done.stderr and not list(trained.rglob("results.json"))[1:]


def change(**config: object) -> None:
    """Replace settings in the checkpoint, like an attacker."""
    saved = torch.load(LAST, weights_only=True)
    saved["config"].update(config)
    torch.save(saved, LAST)


def test_the_config_of_a_checkpoint_runs_no_code(cnntrain, trained: Path) -> None:
    """Its own list of trusted packages has no effect."""
    change(model={"_target_": "os.mkdir", "path": "touched"}, trusted_packages=["os"])
    said = cnntrain.refused("evaluate", f"checkpoint={LAST}", "threads=1")
    assert "model._target_: 'os.mkdir' is not allowed as model" in said and not Path("touched").exists()


def test_comparing_runs_instantiates_nothing_from_their_configs(cnntrain, trained: Path) -> None:
    change(task={"_target_": "os.mkdir", "path": "touched"}, trusted_packages=["os", "posix"])
    shutil.copy(LAST, LAST.with_name("best.pt"))
    cnntrain("compare", "run", "run_dir=c")
    assert not Path("touched").exists()


def test_the_config_of_a_checkpoint_reads_no_environment_variables(cnntrain, trained: Path) -> None:
    change(data={**torch.load(LAST, weights_only=True)["config"]["data"], "root": "${oc.env:SECRET}"})
    said = cnntrain.refused("evaluate", f"checkpoint={LAST}", "threads=1", SECRET="hunter2")
    assert "hunter2" not in said


def test_another_architecture_is_rejected_with_both_described(cnntrain, trained: Path) -> None:
    said = cnntrain.refused(*cnntrain.quick, "model=lenet5", "epochs=2", "run_dir=run", "resume=auto")
    assert "model=mlp" in said and "model=lenet5" in said and "another network" in said
    assert len(said.splitlines()) <= 10


def test_other_classes_are_rejected_with_both_described(cnntrain, make_images) -> None:
    root = make_images()
    arguments = (
        f"model=mlp threads=1 data=image_folder data.root={root} data.size=8 log.figures=false "
        "log.tensorboard=false run_dir=run"
    ).split()
    cnntrain(*arguments, "epochs=1")
    (root / "train" / "light").rename(root / "train" / "bright")
    said = cnntrain.refused(*arguments, "epochs=2", "resume=auto")
    assert "2 classes (dark, light)" in said and "2 classes (bright, dark)" in said and "another dataset" in said
    assert len(said.splitlines()) <= 10


def test_a_run_is_not_overwritten(cnntrain, trained: Path) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert "resume=auto" in cnntrain.refused(*cnntrain.quick, "run_dir=run")
    assert before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}


def test_a_finished_run_is_not_trained_again(cnntrain, trained: Path) -> None:
    before = LAST.stat().st_mtime_ns
    done = cnntrain(*cnntrain.quick, "epochs=1", "run_dir=run", "resume=auto")
    assert "nothing to do" in done.stderr and LAST.stat().st_mtime_ns == before


def test_temporary_files_are_removed_and_the_newest_epochs_kept(cnntrain, trained: Path) -> None:
    (trained / "checkpoints" / ".last.pt.4321.tmp").write_bytes(b"half")
    (trained / ".results.json.4321.tmp").write_bytes(b"half")
    own = trained / ".own.tmp"
    own.touch()
    cnntrain(*cnntrain.quick, "epochs=4", "run_dir=run", "resume=auto", "checkpoint.keep=2")
    kept = sorted(path.name for path in LAST.parent.iterdir())
    assert kept == ["best.pt", "epoch-00003.pt", "epoch-00004.pt", "last.pt"]
    assert own.exists() and not (trained / ".results.json.4321.tmp").exists()
    shutil.copy(LAST.with_name("epoch-00003.pt"), "older.pt")
    cnntrain(*cnntrain.quick, "epochs=4", "run_dir=other", "resume=older.pt")
    assert Path("other/checkpoints/best.pt").exists()
