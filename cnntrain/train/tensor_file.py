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

# What zipfile and torch's unpickler raise on files that are damaged, or made to mislead them.
DAMAGE = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError,
          OverflowError, MemoryError, RecursionError, struct.error, zlib.error, zipfile.BadZipFile,
          pickle.PickleError)  # fmt: skip
MOST_VALUES = 1_000_000  # shared references are counted once per reference
DEEPEST = 50
LONGEST_TEXT = 1_000_000
LARGEST_BITS = 64  # per integer
MOST_EXPANDED_BYTES = 2**26  # by which an expanded tensor (stride 0) may exceed its storage
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def read_tensors(path: Path, root: Path | None = None) -> Any:
    """Load a `torch.save` file to the CPU: plain types and tensors of bounded size (see `check_values`).

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
                    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                        # A few compressed kilobytes could expand to any size. torch.save does not compress.
                        raise UserError(f"{path}: is compressed; use the file as torch.save wrote it")
                    damaged = (
                        archive.testzip()
                    )  # torch.load ignores checksums: a flipped byte would load silently
                if damaged:
                    raise UserError(f"{path}: damaged (checksum of {damaged!r} is wrong); use another file")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        check_values(content)
        return content
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except DAMAGE as error:
        raise UserError(
            f"{path}: not a readable file of tensors ({type(error).__name__}); use another one"
        ) from error


def check_values(content: Any) -> None:
    """Reject types that do not belong in a tensor file, and content that would exhaust time or memory.

    A pickle of a few bytes can contain nested lists whose size doubles at each level, or a tensor of any shape over a
    storage of one element.

    Raises:
        TypeError: a type other than plain types, dict, list, tuple and dense tensors.
        ValueError: too many values, too deep nesting, a reference cycle, or a tensor much larger than its storage.
    """
    sizes: dict[
        int, int
    ] = {}  # number of values by id of each finished container; all are alive, so ids are unique
    open_: list[
        tuple[Any, Iterator[Any], int]
    ] = []  # (container, iterator over its remaining items, values so far)
    entered: set[int] = set()

    def enter(container: Any) -> None:
        if id(container) in entered:
            raise ValueError("it contains itself")
        if len(open_) >= DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        entered.add(id(container))
        open_.append((container, iter(_children(container)), 1))

    value, count = content, _leaf(content)
    if count is not None:
        return
    enter(value)
    while open_:
        container, rest, so_far = open_[-1]
        if so_far > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values")
        for value in rest:
            count = _leaf(value)
            if count is None:
                count = sizes.get(id(value))
            if count is None:
                open_[-1] = (container, rest, so_far)
                enter(value)
                break
            so_far += count
            if so_far > MOST_VALUES:
                raise ValueError(f"it holds more than {MOST_VALUES:,} values")
        else:
            open_.pop()
            entered.discard(id(container))
            sizes[id(container)] = so_far
            if open_:
                outer, others, before = open_[-1]
                open_[-1] = (outer, others, before + so_far)


def _children(container: Any) -> Iterator[Any]:
    if isinstance(container, dict):
        for key, value in container.items():
            if not isinstance(key, str | int):
                raise TypeError(f"a key is a {type(key).__name__}")
            yield key
            yield value
    else:
        yield from container


def _leaf(value: Any) -> int | None:
    """Check a value that is not a container and return 1; return None for a container."""
    if isinstance(value, Tensor):
        _check_tensor(value)
        return 1
    if isinstance(value, dict | list | tuple | set | frozenset):
        return None
    if not isinstance(value, PLAIN):
        raise TypeError(f"it holds a {type(value).__name__}")
    if isinstance(value, int) and value.bit_length() > LARGEST_BITS:
        raise ValueError(f"it holds an integer of {value.bit_length()} bits")
    if isinstance(value, str | bytes) and len(value) > LONGEST_TEXT:
        raise ValueError(f"it holds a string of {len(value):,} characters")
    return 1


def _check_tensor(value: Tensor) -> None:
    plain = (
        type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and value.device.type == "cpu"
    )
    if not plain or value.is_quantized:
        raise TypeError(
            f"it holds an unsupported tensor ({type(value).__name__}, {value.layout}, {value.device})"
        )
    expanded = value.numel() * value.element_size() - value.untyped_storage().nbytes()
    if expanded > MOST_EXPANDED_BYTES:
        raise ValueError(f"it holds a tensor {tuple(value.shape)} that is much larger than its storage")
