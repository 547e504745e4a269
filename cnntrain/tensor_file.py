"""Reading files of tensors that anyone may have written: no code of theirs is run, and damage is found."""

import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from cnntrain.errors import UserError

# What zipfile and torch's unpickler raise on files that are damaged, or made to mislead them.
DAMAGE = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError,
          OverflowError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile, pickle.PickleError)  # fmt: skip


def read_tensors(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU: plain types and tensors.

    Raises:
        UserError: not there, damaged, or holding anything else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch doesn't look: a flipped byte would load silently
            if damaged:
                raise UserError(f"{path}: damaged (checksum of {damaged} is wrong); use another file")
        return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise UserError(
            f"{path}: not a readable file of tensors ({type(error).__name__}); use another one"
        ) from error
