"""A disk that is full: a checkpoint ends the run with 4 and the old one stays; a log only warns."""

from pathlib import Path

import pytest
import torch

from_limit = ("sh", "-c", 'ulimit -f "$0" && exec "$@"')
FOLDER = Path("disk/run/checkpoints")


def whole_and_alone(folder: Path) -> bool:
    """Require that the old checkpoint loads and that there is no temporary file."""
    torch.load(folder / "last.pt", weights_only=True)
    return sorted(path.name for path in folder.iterdir()) in (["last.pt"], ["best.pt", "last.pt"])


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_leaves_the_old_one(cnntrain, inside_namespace) -> None:
    """A file system of 1.5 times the size of the checkpoint has no room for a second one."""
    width, size_kib = 3000, 1.5 * 3 * 4 * 75 * 3000 / 1024
    script = f"mount -t tmpfs -o size={size_kib:.0f}k none disk"
    Path("disk").mkdir()
    around = inside_namespace(script, "--mount")
    around[-2] = f'{script} && "$@"; code=$?; cp -r disk/run saved; exit $code'  # the mount goes with the namespace
    arguments = (
        *cnntrain.quick,
        f"model.values.width={width}",
        "epochs=3",
        "run_dir=disk/run",
        "checkpoint.every_steps=1",
    )
    said = cnntrain(*arguments, code=4, around=around).stderr
    assert "No space left" in said and "the previous one is intact" in said
    assert whole_and_alone(Path("saved/checkpoints"))


@pytest.mark.slow
def test_a_limit_on_file_sizes_leaves_the_old_one(cnntrain) -> None:
    """The checkpoint of SGD without momentum is below the limit, that of AdamW above it."""
    wide = (*cnntrain.quick, "model.values.width=3000", "run_dir=disk/run", "schedule=constant")
    cnntrain(*wide, "epochs=1")
    before = (FOLDER / "last.pt").read_bytes()
    blocks = len(before) // 2 // 512  # dash and bash in POSIX mode count in blocks of 512 or 1024 bytes
    said = cnntrain(*wide, "epochs=2", "resume=auto", code=4, around=(*from_limit, str(blocks // 2))).stderr
    assert "File too large" in said and "the previous one is intact" in said
    assert (FOLDER / "last.pt").read_bytes() == before and whole_and_alone(FOLDER)


@pytest.mark.slow
def test_logs_that_cannot_be_written_warn_once_and_training_continues(cnntrain) -> None:
    Path("run/metrics.csv").mkdir(parents=True)
    arguments = ("model=mlp", "model.values.width=8", "threads=1", "data.limit=200", "epochs=3", "run_dir=run")
    done = cnntrain(*arguments, around=(*from_limit, "80"))
    for what in ("cannot write run/metrics.csv", "cannot write TensorBoard events", "cannot write figures"):
        assert done.stderr.count(what) == 1, done.stderr
    assert Path("run/results.json").exists() and Path("run/checkpoints/last.pt").exists()
