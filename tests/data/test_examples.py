"""Sources of a user: targets are converted or rejected before training."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cnntrain.cli import main
from cnntrain.config.schema import DataSettings
from cnntrain.data.examples import Examples, Source
from cnntrain.data.load import DataSplits, load_data, read_fingerprint
from cnntrain.errors import UserError
from cnntrain.types import DataSpec


class Own(Source):
    """Returns what it is given."""

    def __init__(self, splits: Any, **facts: Any) -> None:
        self.splits, self.facts = splits, {"classes": ("no", "yes"), **facts}

    def spec(self) -> DataSpec:
        return DataSpec(1, 4, 4, **self.facts)

    def load(self) -> Any:
        return self.splits


def examples(count: int = 6, **targets: Any) -> Examples:
    images = torch.arange(count * 16).view(count, 1, 4, 4).to(torch.uint8)
    return Examples(images, targets or {"label": torch.arange(count) % 2}, [str(i) for i in range(count)])


def load(splits: Any, **facts: Any) -> DataSplits:
    return load_data(Own(splits, **facts), DataSettings(val_fraction=0.5))


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_each_name_of_the_validation_split_is_accepted(name: str) -> None:
    data = load({"train": examples(), name: examples(4)})
    assert data.has_own_val
    assert (len(data.train), len(data.val)) == (6, 4)


def test_the_fingerprint_is_that_of_the_converted_examples() -> None:
    train, val = examples(label=np.arange(6) % 2), examples(4, label=[0, 1, 0, 1])
    train.images, val.images = train.images.numpy(), val.images.numpy()
    source = Own({"train": train, "valid": val})
    assert read_fingerprint(source) == load_data(source).fingerprint


@pytest.mark.parametrize(
    ("splits", "part"),
    [
        (None, "dictionary of Examples"),
        ([examples()], "dictionary of Examples"),
        ({"train": [1, 2]}, "dictionary of Examples"),
        ({"val": examples()}, 'no "train"'),
        ({"train": examples(), "dev": examples()}, "split 'dev'"),
        ({"train": examples(), "val": examples(), "valid": examples()}, "'val' and 'valid'"),
    ],
)
def test_an_invalid_return_value_of_load_is_rejected(splits: Any, part: str) -> None:
    with pytest.raises(UserError, match=part):
        load(splits)


LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
SAME = {
    "int32": LABELS.int(),
    "uint8": LABELS.byte(),
    "int8": LABELS.to(torch.int8),
    "float": LABELS.float(),
    "double": LABELS.double(),
    "column": LABELS[:, None],
    "one-hot": torch.nn.functional.one_hot(LABELS, 3),
    "one-hot floats": torch.nn.functional.one_hot(LABELS, 3).float(),
    "one-hot bools": torch.nn.functional.one_hot(LABELS, 3).bool(),
    "list": LABELS.tolist(),
    "numpy": LABELS.numpy().astype(np.int16),
}
THREE = ("a", "b", "c")


@pytest.mark.parametrize("kind", SAME)
def test_equivalent_labels_are_converted(kind: str) -> None:
    data = load({"train": examples(label=SAME[kind]), "val": examples(label=LABELS)}, classes=THREE)
    label = data.train.targets["label"]
    assert label.dtype == torch.int64
    assert label.tolist() == LABELS.tolist()
    again = load({"train": examples(label=LABELS), "val": examples(label=LABELS)}, classes=THREE)
    assert data.fingerprint == again.fingerprint


@pytest.mark.parametrize(
    ("label", "part"),
    [
        (LABELS + 0.5, "not whole numbers"),
        (torch.tensor([0.0, 1, 2, float("nan"), 0, 1]), "not whole numbers"),
        (torch.tensor([0.0, 1, 2, float("inf"), 0, 1]), "not whole numbers"),
        (LABELS.to(torch.complex64), "not whole numbers"),
        (torch.rand(6, 3), r"\(6, 3\).*argmax"),
        (torch.ones(6, 3), r"\(6, 3\).*argmax"),
        (torch.zeros(6, 3, dtype=torch.int64), r"\(6, 3\).*argmax"),
        (torch.eye(6), r"\(6, 6\).*argmax"),
        (torch.zeros(6, 1, 1), r"\(6, 1, 1\)"),
        (LABELS[:4], "6 images and 4 of 'label'"),
        (torch.tensor(1), "a single number"),
        (LABELS + 1, r"2 of 6 train labels are out of range, 0 to 2: 3 \(2\)"),
        (LABELS.float() - 1, "out of range"),
        (["a"] * 6, "to a tensor"),
        (np.array(["a"] * 6), "to a tensor"),
    ],
)
def test_ambiguous_labels_are_rejected(label: Any, part: str) -> None:
    with pytest.raises(UserError, match=part):
        load({"train": examples(label=label)}, classes=THREE)


def test_a_class_without_training_images_causes_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "cnntrain"):
        load({"train": examples(label=LABELS)}, classes=THREE)
        assert not caplog.records
        load({"train": examples(label=LABELS // 2 + 1)}, classes=THREE)
    assert "1 of the 3 classes: a" in caplog.text


@pytest.mark.parametrize(
    ("given", "facts", "part"),
    [
        ({"points": torch.rand(6, 2, 2)}, {}, "needs the target 'label'"),
        ({"label": LABELS}, {"keypoints": ("a", "b")}, "needs the target 'points'"),
        ({"label": LABELS}, {"per_pixel": True}, "needs the target 'mask'"),
        ({"points": torch.rand(6, 4)}, {"keypoints": ("a", "b")}, r"points are torch.float32 \(6, 4\)"),
        ({"points": torch.rand(6, 2, 2), "valid": torch.ones(6)}, {"keypoints": ("a", "b")}, "'valid'"),
        ({"points": torch.full((6, 2, 2), float("nan"))}, {"keypoints": ("a", "b")}, "not finite"),
        (
            {"points": torch.rand(6, 2, 2), "visible": torch.ones(6, 2, dtype=torch.bool)},
            {"keypoints": ("a", "b")},
            "'visible' .* to 'valid'",
        ),
        (
            {"mask": torch.zeros(6, 4, 5, dtype=torch.uint8)},
            {"per_pixel": True},
            r"masks are torch.uint8 \(6, 4, 5\)",
        ),
        ({"mask": torch.zeros(6, 4, 4)}, {"per_pixel": True}, "masks are torch.float32"),
        ({"mask": torch.full((6, 4, 4), 256)}, {"per_pixel": True}, "values from 256 to 256"),
        (
            {"mask": torch.full((6, 4, 4), 2)},
            {"per_pixel": True},
            "masks have the values 2; the classes are 0 to 1",
        ),
    ],
)
def test_unusable_targets_are_rejected(given: dict[str, Any], facts: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        load({"train": examples(**given)}, **facts)


def test_points_and_masks_of_other_types_are_converted() -> None:
    points = torch.rand(6, 2, 2, dtype=torch.float64)
    data = load({"train": examples(points=points), "val": examples(points=points)}, keypoints=("a", "b"))
    assert data.train.targets["points"].dtype == torch.float32
    assert data.train.targets["valid"].dtype == torch.bool and data.train.targets["valid"].all()
    mask = torch.randint(0, 2, (6, 4, 4))
    mask[0] = 255
    data = load({"train": examples(mask=mask), "val": examples(mask=mask[:, None])}, per_pixel=True)
    for part in (data.train, data.val):
        assert part.targets["mask"].dtype == torch.uint8
        assert part.targets["mask"].tolist() == mask.tolist()


def test_numpy_images_are_accepted() -> None:
    one, other = examples(), examples()
    one.images = other.images.numpy()  # type: ignore[union-attr,assignment]
    assert torch.equal(load({"train": one, "val": other}).train.images, other.images)  # type: ignore[arg-type]


CODE = """
import torch
from cnntrain.data.examples import Source

class Plain(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count = count
    def __len__(self):
        return self.count
    def __getitem__(self, i):
        return torch.zeros(1, 4, 4), i % 2

def plain():
    return Plain(3)

class Good(Source):
    def spec(self): ...
    def load(self): ...
"""


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("Plain", ["a torch Dataset", "cnntrain.data.examples.Source", "spec()", "load()"]),
        ("CODE", ["data._target_"]),
    ],
)
def test_a_target_that_is_no_source_is_rejected(
    own_folder: Path, capsys: pytest.CaptureFixture[str], target: str, parts: list[str]
) -> None:
    (own_folder / "mine" / "data").mkdir(parents=True)
    (own_folder / "mine" / "owndata.py").write_text(CODE)
    (own_folder / "mine" / "data" / "own.yaml").write_text(f"_target_: owndata.{target}\n")
    assert main(["--config-dir", "mine", "data=own", "model=mlp", "threads=1"]) == 2
    said = capsys.readouterr().err
    for part in parts:
        assert part in said, said
    assert "Traceback" not in said


@pytest.mark.parametrize("line", ["_target_: owndata.plain", "_target_: owndata.Plain\ncount: 4"])
def test_a_torch_dataset_is_rejected(own_folder: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    (own_folder / "mine" / "data").mkdir(parents=True)
    (own_folder / "mine" / "owndata.py").write_text(CODE)
    (own_folder / "mine" / "data" / "own.yaml").write_text(f"{line}\n")
    assert main(["--config-dir", "mine", "data=own", "model=mlp", "threads=1"]) == 2
    said = capsys.readouterr().err
    assert "a torch Dataset" in said and "cnntrain.data.examples.Source" in said
