"""Read files of tensors that anyone may have written: no code of theirs is run, and damage is found."""

import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnntrain import files
from cnntrain.errors import UserError

# What zipfile and torch's unpickler raise on files that are damaged, or made to mislead them.
DAMAGE = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError,
          OverflowError, MemoryError, RecursionError, struct.error, zlib.error, zipfile.BadZipFile,
          pickle.PickleError)  # fmt: skip
MOST_VALUES = 1_000_000  # with everything that is referred to several times counted as often
DEEPEST = 50
LONGEST_TEXT = 1_000_000
LARGEST_BITS = 64  # of a whole number
MOST_EXPANDED_BYTES = 2**26  # that a tensor may have beyond its storage, by strides of 0
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def read_tensors(path: Path, root: Path | None = None) -> Any:
    """What `torch.save` wrote, on the CPU: plain types and tensors, of bounded size; see `check_values`.

    Tensors may share storage or have strides of 0: copy them before anything writes to them in place.

    Args:
        root: the folder from which on no link is followed. None: the run folder of a file in a folder `checkpoints`;
            any other file that the user names may be a link.

    Raises:
        UserError: not there, damaged, or holding anything else.
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
                        # A few kilobytes could unfold to any size. torch.save doesn't compress.
                        raise UserError(f"{path}: is compressed; use the file as torch.save wrote it")
                    damaged = archive.testzip()  # torch doesn't look: a flipped byte would load silently
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
    """Refuse what a file of tensors has no use for, and what would take forever or all memory to walk through.

    A pickle of a few bytes can hold a list of lists, each twice the one before, that never ends when it is walked;
    and a tensor of any shape over a storage of one number.

    Raises:
        TypeError: another type than plain ones, dict, list, tuple and dense tensors.
        ValueError: too many values, too deep, a circle, or a tensor that is much larger than its storage.
    """
    sizes: dict[
        int, int
    ] = {}  # of the containers that are done, by id: they are alive, so that no id is used twice
    open_: list[tuple[Any, Iterator[Any], int]] = []  # container, what is left of it, values so far
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
    """1 for what contains nothing, once it has been looked at; None for a container."""
    if isinstance(value, Tensor):
        _check_tensor(value)
        return 1
    if isinstance(value, dict | list | tuple | set | frozenset):
        return None
    if not isinstance(value, PLAIN):
        raise TypeError(f"it holds a {type(value).__name__}")
    if isinstance(value, int) and value.bit_length() > LARGEST_BITS:
        raise ValueError(f"it holds a number of {value.bit_length()} bits")
    if isinstance(value, str | bytes) and len(value) > LONGEST_TEXT:
        raise ValueError(f"it holds a text of {len(value):,} characters")
    return 1


def _check_tensor(value: Tensor) -> None:
    plain = (
        type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and value.device.type == "cpu"
    )
    if not plain or value.is_quantized:
        raise TypeError(
            f"it holds a tensor of another kind ({type(value).__name__}, {value.layout}, {value.device})"
        )
    expanded = value.numel() * value.element_size() - value.untyped_storage().nbytes()
    if expanded > MOST_EXPANDED_BYTES:
        raise ValueError(f"it holds a tensor {tuple(value.shape)} over a storage of a few bytes")
