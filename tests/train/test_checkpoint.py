import os
import pickle
from pathlib import Path

import pytest
import torch

from cnntrain.errors import MachineError, UserError
from cnntrain.train import checkpoint
from cnntrain.train.run_dir import open_run_dir, unused_run_dir

STATE = {"state": {"weight": torch.arange(6.0), "names": ["a", "b"], "best": {"val/top1": 0.5}}}


def test_round_trip(tmp_path: Path) -> None:
    checkpoint.save(STATE, tmp_path / "deep" / "last.pt")
    loaded = checkpoint.load(tmp_path / "deep" / "last.pt")
    assert torch.equal(loaded["state"]["weight"], STATE["state"]["weight"])
    assert loaded["state"]["names"] == ["a", "b"]
    assert os.listdir(tmp_path / "deep") == ["last.pt"]


def test_one_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save({"state": torch.zeros(4096)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("touched",)


def test_no_foreign_file_runs_code_or_passes(tmp_path: Path) -> None:
    checkpoint.save(STATE, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    torch.save({"format": checkpoint.FORMAT, "state": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Evil()))
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("evil", "half", "page", "pickle", "list"):
        with pytest.raises(UserError, match=f"{name}.pt: (not a|damaged)"):
            checkpoint.load(tmp_path / f"{name}.pt")
    assert not Path("touched").exists()


def test_what_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(STATE, path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="No space left"):
        checkpoint.save({"state": torch.zeros(99)}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.pt"]


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    with open_run_dir(tmp_path / "run", "x", trains=True) as run:
        (run.checkpoints).mkdir()
        with (
            pytest.raises(UserError, match="another process"),
            open_run_dir(tmp_path / "run", "x", trains=True),
        ):
            pass
        (run.checkpoints / ".last.pt.1.tmp").touch()
        (run.path / ".metrics.csv.1.tmp").touch()
        (run.path / ".mine.tmp").touch()
    with open_run_dir(tmp_path / "run", "x", trains=True) as run:
        assert not list(run.checkpoints.iterdir())
        assert {path.name for path in run.path.glob(".*.tmp")} == {".mine.tmp"}
    with (
        pytest.raises(UserError, match="holds a training"),
        open_run_dir(tmp_path / "run", "x"),
    ):
        pass


def test_runs_started_at_once_do_not_share_a_folder(tmp_path: Path) -> None:
    assert len({unused_run_dir(tmp_path, "net") for _ in range(5)}) == 5
