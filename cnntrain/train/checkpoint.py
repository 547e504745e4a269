"""Checkpoints: one save, one load. A file that exists is whole; a file from a stranger runs no code."""

import contextlib
import io
import platform
import re
from pathlib import Path
from typing import Any

import torch

from cnntrain.errors import MachineError, UserError
from cnntrain.io import safe_files as files
from cnntrain.io.tensor_file import read_tensors

FORMAT = 2


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` (plain types and tensors) so that a kill at any instant leaves the old file or the new one.

    Raises:
        MachineError: the file can't be written (disk full); the old one is intact and no temporary is left.
    """
    write(pack(state), path)


def pack(state: dict[str, Any]) -> memoryview:
    """A checkpoint's bytes: a copy of `state`, which may change from then on."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    return buffer.getbuffer()


def write(packed: memoryview, path: Path) -> None:
    """Put a checkpoint's bytes in place, as `save` does.

    Raises:
        MachineError: see `save`.
    """
    try:
        # Not its parents: a run's folder that is gone is not to be half there again.
        root = files.run_folder_of(path)
        if root == path.parent:
            root.mkdir(exist_ok=True)
        else:
            files.make_folder(path.parent, root)
        files.write_whole(path, packed, root)
    except OSError as error:
        intact = "; the previous one is intact" if path.is_file() else ""
        raise MachineError(f"{path}: can't write the checkpoint: {error.strerror}{intact}") from error


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU.

    Raises:
        UserError: not there, damaged, or not a checkpoint of cnntrain's.
    """
    if not files.exists(path):
        raise UserError(f"{path}: no such checkpoint")
    state = read_tensors(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of cnntrain's, or of another version")
    return state


def keep_newest(folder: Path, count: int) -> None:
    """Delete all but the `count` newest of the checkpoints that are named by their epoch."""
    for old in sorted(folder.glob("epoch-*.pt"))[:-count]:
        files.remove(old, folder.parent)


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed process left half written in a run's folder. Only for the holder of its lock."""
    for inner in (folder, folder / "checkpoints", folder / "figures"):
        if inner == folder or files.is_folder(inner, folder):
            for leftover in inner.glob(".*.tmp"):
                ours = re.fullmatch(
                    r"\..+\.[0-9]+\.tmp", leftover.name
                )  # the name pattern of `files.replacing`
                if ours and (leftover.is_symlink() or not leftover.is_dir()):
                    files.remove(leftover, folder)


def versions() -> dict[str, str]:
    """What the numbers of a run may depend on."""
    from importlib.metadata import PackageNotFoundError, version

    # Not platform.platform(): it runs `uname` to find the processor's name.
    machine = (platform.system(), platform.release(), platform.machine(), "".join(platform.libc_ver()))
    found = {"python": platform.python_version(), "platform": "-".join(filter(None, machine))}
    for name in ("cnntrain", "torch", "torchvision", "numpy", "hydra-core"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
