"""How much memory there is, and what of a data set takes it."""

from pathlib import Path

import pytest
import torch

from cnntrain.data import cache as resident
from cnntrain.data.examples import Examples
from cnntrain.data.loader import ResidentLoader


def write(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


@pytest.mark.parametrize(
    ("mine", "left"),
    [
        ("0::/slice/job\n", [900, 70, 40]),
        ("0::/slice/other\n", [900, 70]),
        ("0::/\n", [900]),
        ("0::/../elsewhere\n", [900]),  # of a container, seen from the host
        ("5:cpu,cpuacct:/x\n4:memory:/slurm/job_7\n0::/nothing\n", [500, 0, 900]),
        ("", []),
    ],
    ids=["job", "its parent's", "root", "container", "version 1", "none"],
)
def test_every_control_group_around_this_process_counts(tmp_path: Path, mine: str, left: list[int]) -> None:
    tree = tmp_path / "cgroup"
    cached = "anon 7\nactive_file 5\ninactive_file 10"  # makes room when it is wanted
    write(tree, memory__max=1000, memory__current=100, memory__stat="anon 100")
    write(tree / "slice", memory__max=200, memory__current=145, memory__stat=cached)
    write(tree / "slice" / "job", memory__max=60, memory__current=35, memory__stat=cached)
    write(tree / "slice" / "other", memory__max="max", memory__current=20, memory__stat="anon 1")
    old = "active_file 1\ntotal_active_file 40\ntotal_inactive_file 0"
    write(tree / "memory", memory__limit_in_bytes=600, memory__usage_in_bytes=140, memory__stat=old)
    write(
        tree / "memory" / "slurm" / "job_7",
        memory__limit_in_bytes=50,
        memory__usage_in_bytes=80,
        memory__stat="anon 1",
    )
    (tmp_path / "mine").write_text(mine)
    assert list(resident._left_to_control_groups(tmp_path / "mine", tree)) == left
    assert list(resident._left_to_control_groups(tmp_path / "nowhere", tree)) == []


def test_masks_lie_where_the_images_do() -> None:
    images, mask = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, 8, 8, dtype=torch.uint8)
    examples = Examples(images, {"mask": mask, "label": torch.arange(4)}, list("abcd"))
    assert resident.decoded_bytes(examples) == images.numel() + mask.numel()
    beside = ResidentLoader(examples, torch.device("meta"), on_device=False)
    assert beside.targets["mask"].device.type == "cpu" and beside.targets["label"].device.type == "meta"
    there = ResidentLoader(examples, torch.device("meta"), on_device=True)
    assert there.targets["mask"].device.type == "meta"
    for loader in (beside, there):
        batch = next(loader.batches(torch.arange(4), 2))
        assert {each.device.type for each in (batch.images, *batch.targets.values())} == {"meta"}
        assert batch.targets["mask"].shape == (2, 8, 8)
