"""scikit-learn's 1,797 handwritten digits: a small dataset that needs no download."""

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from cnntrain.data.examples import Examples, Source
from cnntrain.data.splits import split_train_val
from cnntrain.types import DataSpec

TEST_FRACTION = 0.2
TEST_SEED = 1797  # fixed, so that the test set is always the same


class Digits(Source):
    """Gray images of 8x8 pixels; the 17 gray levels 0 to 16 are stored as 0, 15, ..., 240.

    The test set is a fixed, stratified sample of 20 %. Source: E. Alpaydin, C. Kaynak, Optical Recognition of
    Handwritten Digits (UCI, 1998), as shipped with scikit-learn.
    """

    def spec(self) -> DataSpec:
        return DataSpec(1, 8, 8, classes=tuple("0123456789"), hflip_ok=False)

    def load(self) -> dict[str, Examples]:
        images, labels = read_digits()
        names = [f"digits/{row:04}" for row in range(len(labels))]
        examples = Examples(torch.from_numpy(images), {"label": torch.from_numpy(labels)}, names)
        train, test = split_train_val(examples, TEST_FRACTION, None, 0, TEST_SEED)
        return {"train": examples.subset(train), "test": examples.subset(test)}


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return images, uint8 (1797, 1, 8, 8), and labels, int64 (1797,).

    They are read from scikit-learn's file, because importing scikit-learn takes a second.
    """
    package = find_spec("sklearn")
    folder = Path(package.origin).parent if package and package.origin else Path()
    file = folder / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():
        with gzip.open(file, "rt") as text:
            table = np.loadtxt(text, delimiter=",")
    else:
        from sklearn.datasets import load_digits

        bunch = load_digits()  # pyright: ignore[reportAssignmentType]
        table = np.column_stack([bunch["data"], bunch["target"]])  # pyright: ignore
    images = (table[:, :-1] * 15).astype(np.uint8).reshape(-1, 1, 8, 8)
    return images, table[:, -1].astype(np.int64)
