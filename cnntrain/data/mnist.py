"""MNIST and Fashion-MNIST from their IDX files."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from cnntrain.data.download import download
from cnntrain.data.examples import Examples
from cnntrain.data.source import Source, default_root
from cnntrain.errors import UserError
from cnntrain.spec import DataSpec

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


class IdxDataset(Source):
    """28x28 grey images in IDX files, laid out as torchvision does.

    Args:
        root: folder that has `<folder>/raw/`, or these files themselves; null: `~/.cache/cnntrain`,
            downloaded through torchvision when it isn't there.
    """

    folder: str
    facts: DataSpec

    def __init__(self, root: str | None = None) -> None:
        self.root = Path(root).expanduser() if root else default_root()

    def spec(self) -> DataSpec:
        return self.facts

    def load(self) -> dict[str, Examples]:
        raw = self._find() or self._download()
        splits = {}
        for split, (image_file, label_file) in FILES.items():
            images, labels = read_idx(raw / image_file, 3), read_idx(raw / label_file, 1)
            if len(images) != len(labels) or images.shape[1:] != (28, 28) or labels.max(initial=0) > 9:
                raise UserError(
                    f"data: {raw} holds {images.shape} images and {labels.shape} labels; not {self.folder}"
                )
            names = [f"{split}/{row:05}" for row in range(len(labels))]
            targets = {"label": torch.from_numpy(labels.astype(np.int64))}
            splits[split] = Examples(torch.from_numpy(images)[:, None], targets, names)
        return splits

    def _find(self) -> Path | None:
        """The folder that has all four files, plain or .gz."""
        names = [name for pair in FILES.values() for name in pair]
        for folder in (self.root / self.folder / "raw", self.root / "raw", self.root):
            if all((folder / name).is_file() or (folder / f"{name}.gz").is_file() for name in names):
                return folder
        return None

    def _download(self) -> Path:
        download(
            self.folder, self.root, f"{self.root / self.folder / 'raw'} (and {self.root})", self.downloads
        )
        found = self._find()
        assert found is not None, "torchvision changed its layout"
        return found


class MNIST(IdxDataset):
    """70,000 handwritten digits (LeCun, Cortes, Burges 1998); the usual mean and standard deviation."""

    folder = "MNIST"
    facts = DataSpec(1, 28, 28, tuple("0123456789"), mean=(0.1307,), std=(0.3081,), mirror_safe=False)


class FashionMNIST(IdxDataset):
    """70,000 pictures of clothes (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747)."""

    folder = "FashionMNIST"
    facts = DataSpec(
        1,
        28,
        28,
        (
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        mean=(0.2860,),
        std=(0.3530,),
    )


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """uint8 array of an IDX file, or of its .gz where the file itself is missing.

    The format: two zero bytes, the type (8: unsigned byte), the number of dimensions, each as a big-endian
    int32, then the values (http://yann.lecun.com/exdb/mnist/).

    Raises:
        UserError: the file is no such thing, or its length is not what its header says.
    """
    try:
        content = (
            path.read_bytes()
            if path.is_file()
            else gzip.decompress(path.with_name(path.name + ".gz").read_bytes())
        )
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"data: {path}: can't be read ({error}); remove it to have it downloaded again"
        ) from error
    header = 4 + 4 * dimensions
    shape = tuple(int(n) for n in np.frombuffer(content[4:header], ">i4")) if len(content) >= header else ()
    sound = content[:4] == bytes([0, 0, 8, dimensions]) and min(shape, default=0) >= 0
    if not sound or len(content) - header != math.prod(shape):
        raise UserError(
            f"data: {path}: no whole IDX file of {dimensions} dimension(s); remove it, and download again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()
