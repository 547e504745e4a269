"""Read tensor files from untrusted sources: no code in them is executed, and corruption is detected."""

import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnntrain.errors import UserError
from cnntrain.io import safe_files as files

# Exceptions that zipfile and torch's unpickler raise on damaged or malicious files.
READ_ERRORS = (
    *(OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError),
    *(OverflowError, MemoryError, RecursionError, struct.error, zlib.error, zipfile.BadZipFile, pickle.PickleError),
)
MAX_VALUES = 1_000_000  # an object that is referenced twice counts twice
MAX_DEPTH = 50
MAX_TEXT_LENGTH = 1_000_000
MAX_INTEGER_BITS = 64
MAX_EXPANDED_BYTES = 2**26  # by which an expanded tensor (stride 0) may exceed its storage
LEAF_TYPES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def read_tensors(path: Path, root: Path | None = None) -> Any:
    """Load a file written by `torch.save` to the CPU: plain types and tensors of bounded size (see `check_values`).

    Tensors may share storage or have a stride of 0. Copy them before modifying them in place.

    Args:
        root: the folder below which no link is followed. None: the run folder if the file is in a `checkpoints`
            folder; any other file named by the user may be a link.

    Raises:
        UserError: the file is missing, corrupt, or contains other types.
    """
    if root is None and path.parent.name == "checkpoints":
        root = files.run_folder_of(path)
    if root is None and not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with files.open_read(path, root) if root else path.open("rb") as file:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    # A few compressed kilobytes could expand to any size. torch.save does not compress.
                    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                        raise UserError(f"{path}: is compressed; use the file as torch.save wrote it")
                    # torch.load ignores checksums: a flipped byte would load silently.
                    if damaged := archive.testzip():
                        raise UserError(f"{path}: damaged (checksum of {damaged!r} is wrong); use another file")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        try:
            check_values(content)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: {error}; use another file") from error
        return content
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except READ_ERRORS as error:
        raise UserError(f"{path}: not a readable file of tensors ({type(error).__name__}); use another file") from error


def check_values(content: Any) -> None:
    """Reject types that do not belong in a tensor file, and content that would exhaust time or memory.

    A pickle of a few bytes can contain nested lists whose size doubles at each level, or a tensor of any shape over a
    storage of one element.

    Raises:
        TypeError: a type other than plain types, dict, list, tuple, set, frozenset and dense tensors.
        ValueError: too many values, too deep nesting, a reference cycle, or a tensor much larger than its storage.
    """
    _count_values(content, sizes={}, parents=[])


def _count_values(value: Any, sizes: dict[int, int], parents: list[int]) -> int:
    """Check a value and return the number of values in it.

    Args:
        sizes: number of values by id of each finished container, so that a shared container is visited once. All
            containers are alive, so ids are unique.
        parents: ids of the containers around this value.
    """
    if not isinstance(value, dict | list | tuple | set | frozenset):
        _check_leaf(value)
        return 1
    key = id(value)
    if key not in sizes:
        if key in parents:
            raise ValueError("it contains itself")
        if len(parents) >= MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        count, inner = 1, [*parents, key]
        for child in _children(value):
            count += _count_values(child, sizes, inner)
            if count > MAX_VALUES:
                raise ValueError(f"it holds more than {MAX_VALUES:,} values")
        sizes[key] = count
    return sizes[key]


def _children(container: Any) -> Iterator[Any]:
    if not isinstance(container, dict):
        yield from container
        return
    for key, value in container.items():
        if not isinstance(key, str | int):
            raise TypeError(f"a key is a {type(key).__name__}")
        yield key
        yield value


def _check_leaf(value: Any) -> None:
    if isinstance(value, Tensor):
        _check_tensor(value)
        return
    if not isinstance(value, LEAF_TYPES):
        raise TypeError(f"it holds a {type(value).__name__}")
    if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
        raise ValueError(f"it holds an integer of {value.bit_length()} bits")
    if isinstance(value, str | bytes) and len(value) > MAX_TEXT_LENGTH:
        raise ValueError(f"it holds a string of {len(value):,} characters")


def _check_tensor(value: Tensor) -> None:
    dense = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
    if not dense or value.device.type != "cpu" or value.is_quantized:
        raise TypeError(f"it holds an unsupported tensor ({type(value).__name__}, {value.layout}, {value.device})")
    excess = value.numel() * value.element_size() - value.untyped_storage().nbytes()
    if excess > MAX_EXPANDED_BYTES:
        raise ValueError(f"it holds a tensor {tuple(value.shape)} that is much larger than its storage")
