"""`check machinery` finds what is not reproducible."""

from pathlib import Path

import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.slow

PLANTED = "model._target_=planted_learning."

BROKEN = {
    "state outside of the checkpoint": ([f"{PLANTED}ForgetsOnReload"], "reload", "not saved"),
    "a layer created during training": ([f"{PLANTED}UnknownKeys"], "reload", "load"),
    "NumPy's generator": ([f"{PLANTED}DrawsFromNumpy"], "repeat", "generator"),
    "depends on the memory format": ([f"{PLANTED}ReadsMemory"], "memory layout", "memory"),
    "too large for bf16": ([f"{PLANTED}Overflows", "precision=bf16"], "precision", "bf16"),
    "a random decoder": (["data=random_validation", "data.cache=none"], "workers", "process"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_faults_are_named(name: str, context_of, findings_of) -> None:
    overrides, check, subject = BROKEN[name]
    finding = findings_of(context_of("model=sound", *overrides), check.replace(" ", "-"))[check]
    assert finding.verdict == "FAIL", finding
    assert subject in f"{finding.evidence} {finding.cause} {finding.remedy}", finding


@pytest.mark.parametrize("model", ["lenet5", pytest.param("fmnist_cnn", marks=pytest.mark.long), "sound"])
def test_sound_machinery_passes(model: str, context_of, findings_of) -> None:
    found = findings_of(context_of(f"model={model}", "precision=bf16"), "machinery")
    verdicts = {name: finding.verdict for name, finding in found.items()}
    assert verdicts.pop("workers") == "SKIP"
    assert set(verdicts.values()) == {"PASS"}, found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(6):
                pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(tmp_path / split / label / f"{number}.png")
    return tmp_path


def test_workers_read_the_same(folder: Path, context_of, findings_of) -> None:
    stream = ("model=sound", "data=image_folder", f"data.root={folder}", "data.size=8", "data.cache=none")
    for overrides in ((), ("augment=torchvision", "augment.torchvision.name=RandomAutocontrast")):
        finding = findings_of(context_of(*stream, *overrides), "workers")["workers"]
        assert finding.verdict == "PASS" and "12 examples" in finding.evidence, finding
