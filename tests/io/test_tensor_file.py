"""Tensor files from untrusted sources: bounded in size, uncorrupted, plain types only."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from cnntrain.errors import UserError
from cnntrain.io.tensor_file import check_values, read_tensors


def doubled(times: int) -> list[Any]:
    """Return nested lists of 2**times values, which share their memory."""
    nested: list[Any] = [0]
    for _ in range(times):
        nested = [nested, nested]
    return nested


def deep(times: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(times):
        nested = [nested]
    return nested


def cyclic() -> list[Any]:
    nested: list[Any] = []
    nested.append({"again": nested})
    return nested


VALID = [
    None,
    5,
    "text",
    [],
    {},
    {"a": [1, 2.0, None, True, "x"], 5: (1, (2, 3))},
    doubled(15),
    deep(40),
    {"w": torch.zeros(3), "expanded": torch.zeros(1).expand(1000), "half": torch.zeros(2, dtype=torch.float16)},
    torch.zeros(4, 5).t(),
    [torch.float32, torch.device("cpu"), b"raw"],
    float("inf"),
    2**63,
]
INVALID: dict[str, Any] = {
    "2**32 values": doubled(32),
    "2**45 values": doubled(45),
    "a long list": list(range(1_000_001)),
    "60 levels": deep(60),
    "a cycle": cyclic(),
    "a large integer": 10**400,
    "a long string": "x" * 1_000_001,
    "a tuple as key": {(1, 2): 3},
    "another type": [object()],
    "an expanded tensor": torch.zeros(1).expand(10**9),
    "an expanded float64 tensor": torch.zeros(1, dtype=torch.float64).expand(2**23 + 2),
    "a sparse tensor": torch.eye(3).to_sparse(),
    "a meta tensor": torch.zeros(3, device="meta"),
    "a quantized tensor": torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8),
}


@pytest.mark.parametrize("value", VALID, ids=[str(number) for number in range(len(VALID))])
def test_plain_content_is_accepted(value: Any) -> None:
    check_values(value)
    check_values({"a": [value, value]})


@pytest.mark.parametrize("kind", INVALID)
def test_unbounded_content_and_other_types_are_rejected(kind: str) -> None:
    for content in (INVALID[kind], {"state": [INVALID[kind]]}):
        with pytest.raises((TypeError, ValueError)):
            check_values(content)


def test_limits_are_inclusive() -> None:
    check_values(deep(49))
    with pytest.raises(ValueError, match="50"):
        check_values(deep(50))
    check_values(torch.zeros(1, dtype=torch.float64).expand(2**23 + 1))


@pytest.mark.parametrize("kind", ["2**45 values", "a cycle", "an expanded tensor", "a sparse tensor"])
def test_a_small_file_with_invalid_content_is_rejected(kind: str) -> None:
    torch.save({"format": 1, "state": INVALID[kind]}, "bad.pt")
    assert Path("bad.pt").stat().st_size < 10_000
    with pytest.raises(UserError, match=r"bad\.pt: it (holds|contains|is nested)"):
        read_tensors(Path("bad.pt"))


def test_a_compressed_file_is_rejected() -> None:
    torch.save({"w": torch.zeros(100_000)}, "stored.pt")
    with (
        zipfile.ZipFile("stored.pt") as stored,
        zipfile.ZipFile("compressed.pt", "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for name in stored.namelist():
            compressed.writestr(name, stored.read(name))
    assert torch.equal(read_tensors(Path("stored.pt"))["w"], torch.zeros(100_000))
    with pytest.raises(UserError, match=r"compressed\.pt: is compressed"):
        read_tensors(Path("compressed.pt"))


def test_a_flipped_bit_is_detected() -> None:
    torch.save({"w": torch.zeros(1000)}, "intact.pt")
    content = bytearray(Path("intact.pt").read_bytes())
    content[content.index(bytes(4000)) + 2000] ^= 1
    Path("flipped.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"flipped\.pt.*checksum"):
        read_tensors(Path("flipped.pt"))


def test_links_are_followed_only_outside_run_folders() -> None:
    torch.save({"w": torch.zeros(2)}, "target.pt")
    Path("run").mkdir()
    Path("run/link.pt").symlink_to("../target.pt")
    assert torch.equal(read_tensors(Path("run/link.pt"))["w"], torch.zeros(2))
    with pytest.raises(UserError, match="link"):
        read_tensors(Path("run/link.pt"), Path("run"))
    Path("run/checkpoints").mkdir()
    Path("run/checkpoints/last.pt").symlink_to("../../target.pt")
    with pytest.raises(UserError, match="link"):
        read_tensors(Path("run/checkpoints/last.pt"))


@pytest.mark.parametrize("root", [None, Path("run")])
def test_a_missing_file_is_a_user_error(root: Path | None) -> None:
    Path("run").mkdir()
    with pytest.raises(UserError, match=r"run/missing\.pt"):
        read_tensors(Path("run/missing.pt"), root)
