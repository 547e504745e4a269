"""CIFAR-10 and CIFAR-100, read by torchvision, which verifies the MD5 checksums."""

from dataclasses import dataclass

import numpy as np
import torch

from cnntrain.data.examples import Examples, Source
from cnntrain.data.files import dataset_root, download
from cnntrain.types import DataSpec

CIFAR10_CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
CIFAR100_CLASSES = tuple(
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle "
    "caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant "
    "flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man "
    "maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree "
    "plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
    "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train "
    "trout tulip turtle wardrobe whale willow_tree wolf woman worm".split()
)


@dataclass
class CIFAR10(Source):
    """60,000 color images 32x32 in 10 classes (Krizhevsky 2009); downloaded if missing."""

    root: str | None = None  # folder with torchvision's folder of batches; None: `~/.cache/cnntrain`
    name = "CIFAR10"
    folder = "cifar-10-batches-py"
    metadata = DataSpec(3, 32, 32, CIFAR10_CLASSES, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))

    def spec(self) -> DataSpec:
        return self.metadata

    def load(self) -> dict[str, Examples]:
        root = dataset_root(self.root)
        root = root.parent if root.name == self.folder else root
        splits = {}
        for split in ("train", "test"):
            dataset = download(self.name, root, str(root / self.folder), self.downloads, train=split == "train")
            images = torch.from_numpy(np.ascontiguousarray(dataset.data.transpose(0, 3, 1, 2)))
            labels = torch.tensor(dataset.targets, dtype=torch.int64)
            splits[split] = Examples(images, {"label": labels}, [f"{split}/{row:05}" for row in range(len(images))])
        return splits


class CIFAR100(CIFAR10):
    """60,000 color images 32x32 in 100 classes (Krizhevsky 2009)."""

    name = "CIFAR100"
    folder = "cifar-100-python"
    metadata = DataSpec(3, 32, 32, CIFAR100_CLASSES, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))
