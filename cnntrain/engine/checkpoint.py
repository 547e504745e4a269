"""Checkpoints: one save, one load. A file that exists is whole; a file from a stranger runs no code."""

import contextlib
import io
import os
import platform
import zipfile
from pathlib import Path
from typing import Any

import torch

from cnntrain.errors import MachineError, UserError

FORMAT = 1


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` (plain types and tensors) so that a kill at any instant leaves the old file or the new one.

    Raises:
        MachineError: the file can't be written (disk full); the old one is intact and no temporary is left.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise MachineError(
            f"{path}: can't write the checkpoint: {error.strerror}; the previous one is intact"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU.

    Raises:
        UserError: not there, damaged, or not a checkpoint of cnntrain's.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # a flipped byte would load silently
        if damaged:
            raise UserError(f"{path}: damaged (checksum of {damaged} is wrong); use another checkpoint")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # whatever a foreign file makes the unpickler raise
        raise UserError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); use another one"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of cnntrain's, or of another version")
    return state


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed process left half written. Only for the holder of the run folder's lock."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """What the numbers of a run may depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("cnntrain", "torch", "torchvision", "numpy", "hydra-core"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
