"""Files of tensors from anyone: bounded, whole, of plain types."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from cnntrain.errors import UserError
from cnntrain.train.tensor_file import check_values, read_tensors


def doubled(times: int) -> list[Any]:
    found: list[Any] = [0]
    for _ in range(times):
        found = [found, found]
    return found


def deep(times: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(times):
        found = [found]
    return found


def circle() -> list[Any]:
    found: list[Any] = []
    found.append({"again": found})
    return found


SOUND = [
    None, 5, "text", [], {}, {"a": [1, 2.0, None, True, "x"], 5: (1, (2, 3))}, doubled(15), deep(40),
    {"w": torch.zeros(3), "expanded": torch.zeros(1).expand(1000), "half": torch.zeros(2, dtype=torch.float16)},
    torch.zeros(4, 5).t(), [torch.float32, torch.device("cpu"), b"raw"], float("inf"), 2**63,
]  # fmt: skip
BAD: dict[str, Any] = {
    "doubled": doubled(32),
    "doubled beyond": doubled(45),
    "many": list(range(1_000_001)),
    "deep": deep(60),
    "circle": circle(),
    "a large number": 10**400,
    "a long text": "x" * 1_000_001,
    "a key that is a tuple": {(1, 2): 3},
    "another type": [object()],
    "a tensor of a few bytes": torch.zeros(1).expand(10**9),
    "a tensor of wide numbers": torch.zeros(1, dtype=torch.float64).expand(2**23 + 2),
    "a sparse tensor": torch.eye(3).to_sparse(),
    "a tensor nowhere": torch.zeros(3, device="meta"),
    "a quantized tensor": torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8),
}


@pytest.mark.parametrize("value", SOUND, ids=[str(number) for number in range(len(SOUND))])
def test_plain_content_passes(value: Any) -> None:
    check_values(value)
    check_values({"a": [value, value]})


@pytest.mark.parametrize("kind", BAD)
def test_what_has_no_end_or_no_use_is_refused(kind: str) -> None:
    for content in (BAD[kind], {"state": [BAD[kind]]}):
        with pytest.raises((TypeError, ValueError)):
            check_values(content)


def test_what_is_as_large_as_may_be_passes() -> None:
    check_values(deep(49))
    with pytest.raises(ValueError, match="50 deep"):
        check_values(deep(50))
    check_values(torch.zeros(1, dtype=torch.float64).expand(2**23 + 1))


@pytest.mark.parametrize("kind", ["doubled beyond", "circle", "a tensor of a few bytes", "a sparse tensor"])
def test_a_file_with_it_is_refused(kind: str) -> None:
    torch.save({"format": 1, "state": BAD[kind]}, "bad.pt")
    assert Path("bad.pt").stat().st_size < 10_000
    with pytest.raises(UserError, match=r"bad\.pt: not a readable file of tensors"):
        read_tensors(Path("bad.pt"))


def test_a_compressed_file_is_refused() -> None:
    torch.save({"w": torch.zeros(100_000)}, "plain.pt")
    with (
        zipfile.ZipFile("plain.pt") as plain,
        zipfile.ZipFile("small.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    assert torch.equal(read_tensors(Path("plain.pt"))["w"], torch.zeros(100_000))
    with pytest.raises(UserError, match="compressed"):
        read_tensors(Path("small.pt"))


def test_a_flipped_bit_is_found() -> None:
    torch.save({"w": torch.zeros(1000)}, "whole.pt")
    content = bytearray(Path("whole.pt").read_bytes())
    place = content.index(bytes(4000)) + 2000
    content[place] ^= 1
    Path("flipped.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"flipped\.pt: damaged \(checksum"):
        read_tensors(Path("flipped.pt"))


def test_links_count_as_files_where_the_user_names_them_alone() -> None:
    torch.save({"w": torch.zeros(2)}, "there.pt")
    Path("run").mkdir()
    Path("run/link.pt").symlink_to("../there.pt")
    assert torch.equal(read_tensors(Path("run/link.pt"))["w"], torch.zeros(2))
    with pytest.raises(UserError, match="link"):
        read_tensors(Path("run/link.pt"), Path("run"))
    Path("run/checkpoints").mkdir()
    Path("run/checkpoints/last.pt").symlink_to("../../there.pt")
    with pytest.raises(UserError, match="link"):
        read_tensors(Path("run/checkpoints/last.pt"))
    for missing in (None, Path("run")):
        with pytest.raises(UserError, match="no such file"):
            read_tensors(Path("run/missing.pt"), missing)
