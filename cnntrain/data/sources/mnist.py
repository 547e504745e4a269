"""MNIST and Fashion-MNIST from their IDX files."""

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from cnntrain.data.examples import Examples, Source
from cnntrain.data.files import dataset_root, download
from cnntrain.errors import UserError
from cnntrain.types import DataSpec

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
FASHION_CLASSES = tuple("T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(","))
MAX_UNPACKED_BYTES = 2**28  # limit for .gz files; MNIST's 60,000 images take 47 million


@dataclass
class IdxDataset(Source):
    """Base class of 28x28 gray images in IDX files, in torchvision's folder layout; downloaded if missing."""

    root: str | None = None  # folder that contains `<folder>/raw/`, or the files; None: `~/.cache/cnntrain`
    folder: ClassVar[str]
    metadata: ClassVar[DataSpec]

    def spec(self) -> DataSpec:
        return self.metadata

    def load(self) -> dict[str, Examples]:
        root = dataset_root(self.root)
        raw = self._find(root)
        if raw is None:
            looked_in = f"{root / self.folder / 'raw'} (and {root})"
            download(self.folder, root, looked_in, self.downloads)
            raw = self._find(root)
            assert raw is not None, "torchvision changed its layout"
        splits = {}
        for split, (image_file, label_file) in FILES.items():
            images, labels = read_idx(raw / image_file, 3), read_idx(raw / label_file, 1)
            if len(images) != len(labels) or images.shape[1:] != (28, 28) or labels.max(initial=0) > 9:
                raise UserError(
                    f"data: {raw} has {images.shape} images and {labels.shape} labels; this is not {self.folder}"
                )
            names = [f"{split}/{row:05}" for row in range(len(labels))]
            targets = {"label": torch.from_numpy(labels.astype(np.int64))}
            splits[split] = Examples(torch.from_numpy(images)[:, None], targets, names)
        return splits

    def _find(self, root: Path) -> Path | None:
        """Return the folder that contains all four files, unpacked or as .gz."""
        names = [name for pair in FILES.values() for name in pair]
        for folder in (root / self.folder / "raw", root / "raw", root):
            if all((folder / name).is_file() or (folder / f"{name}.gz").is_file() for name in names):
                return folder
        return None


class MNIST(IdxDataset):
    """70,000 handwritten digits (LeCun, Cortes, Burges 1998)."""

    folder = "MNIST"
    metadata = DataSpec(1, 28, 28, tuple("0123456789"), mean=(0.1307,), std=(0.3081,), hflip_ok=False)


class FashionMNIST(IdxDataset):
    """70,000 images of clothes (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747)."""

    folder = "FashionMNIST"
    metadata = DataSpec(1, 28, 28, FASHION_CLASSES, mean=(0.2860,), std=(0.3530,))


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file, or its .gz if the file is missing; return a uint8 array.

    The format: two zero bytes, the type (8: unsigned byte), the number of dimensions, the length of each as a
    big-endian int32, and the values (http://yann.lecun.com/exdb/mnist/).
    """
    packed = not path.is_file()
    if packed:
        path = path.with_name(path.name + ".gz")
    header_bytes, values = 4 + 4 * dimensions, b""
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            header = file.read(header_bytes)
            shape = tuple(np.frombuffer(header[4:], ">i4").tolist()) if len(header) == header_bytes else ()
            valid = header[:4] == bytes([0, 0, 8, dimensions]) and min(shape, default=-1) >= 0
            count = math.prod(shape)
            if valid and packed and count > MAX_UNPACKED_BYTES:
                raise UserError(
                    f"data: {path}: would unpack to {count:,} bytes, more than {MAX_UNPACKED_BYTES:,}; unpack it "
                    "with gunzip if it is meant to be that large"
                )
            if valid and (packed or count < path.stat().st_size):
                values = file.read(count + 1)  # read one extra byte to detect a file that is too long
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data: {path}: cannot be read ({error}); remove it to download it again") from error
    if not valid or len(values) != count:
        raise UserError(
            f"data: {path}: is not a complete IDX file with {dimensions} dimension(s); remove it to download it again"
        )
    return np.frombuffer(values, np.uint8).reshape(shape).copy()
