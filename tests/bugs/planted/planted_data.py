"""Datasets with one realistic fault each."""

import dataclasses
import tempfile
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.sources.digits import Digits
from cnntrain.data.sources.toys import ToyFaces, ToyShapes
from cnntrain.types import DataSpec

Splits = dict[str, Examples]


def with_images(examples: Examples, images: Tensor | LazyImages) -> Examples:
    return dataclasses.replace(examples, images=images)


def with_target(examples: Examples, name: str, target: Tensor) -> Examples:
    return dataclasses.replace(examples, targets={**examples.targets, name: target})


class Unnormalized(Digits):
    """Pixels from 0 to 255 reach the network."""

    def spec(self) -> DataSpec:
        return dataclasses.replace(super().spec(), mean=(0.0,), std=(1 / 255,))


class OneOnly(Digits):
    """Every validation image is the same."""

    def load(self) -> Splits:
        splits = super().load()
        images = splits["test"].images
        return {
            "train": splits["train"],
            "val": with_images(splits["test"], images[:1].expand(len(images), -1, -1, -1)),
        }


class Black(Digits):
    """Validation images were not found and are black."""

    def load(self) -> Splits:
        splits = super().load()
        return {"train": splits["train"], "val": with_images(splits["test"], splits["test"].images * 0)}


class TestInTrain(Digits):
    """Half of the test images are also training images."""

    def load(self) -> Splits:
        splits = super().load()
        train, test = splits["train"], splits["test"]
        rows = torch.arange(0, len(test), 2)
        more = test.subset(rows)
        label = torch.cat((train.targets["label"], more.targets["label"]))
        joined = Examples(torch.cat((train.images, more.images)), {"label": label}, [*train.names, *more.names])
        return {"train": joined, "test": test}


class BrighterInTrain(TestInTrain):
    """The same, saved a little brighter and noisier."""

    def load(self) -> Splits:
        splits = super().load()
        train = splits["train"]
        noise = torch.randint(0, 3, train.images.shape, generator=torch.Generator().manual_seed(0))
        images = (train.images.float() * 0.9 + 5 + noise).clamp(0, 255).to(torch.uint8)
        return {**splits, "train": with_images(train, images)}


class NoThrees(Digits):
    """The training images contain no 3, although it is a class."""

    def load(self) -> Splits:
        splits = super().load()
        rows = (splits["train"].targets["label"] != 3).nonzero().flatten()
        return {**splits, "train": splits["train"].subset(rows)}


class Reshaped(ToyShapes):
    """(N, H, W, C) is reshaped to (N, C, H, W) instead of permuted."""

    def load(self) -> Splits:
        splits = super().load()
        return {
            name: with_images(part, part.images.movedim(1, -1).reshape(part.images.shape))
            for name, part in splits.items()
        }


class Noisy:
    """A decoder that augments all images, validation images included."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)

    def __call__(self, path: str, box: object = None) -> tuple[Tensor, Tensor]:
        image = torch.from_numpy(np.asarray(Image.open(path)).copy())[None]
        noise = torch.randint(0, 20, image.shape, dtype=torch.uint8)
        return image // 2 + noise, torch.eye(3, dtype=torch.float64)


class RandomValidation(Digits):
    """Images that change each time they are read."""

    def load(self) -> Splits:
        self.folder = tempfile.TemporaryDirectory()
        splits = {name: part.subset(torch.arange(60)) for name, part in super().load().items()}
        for name, part in splits.items():
            paths = [f"{self.folder.name}/{name}-{i}.png" for i in range(len(part))]
            for path, image in zip(paths, part.images, strict=True):
                Image.fromarray(image[0].numpy()).save(path)
            splits[name] = with_images(part, LazyImages(paths, Noisy(part.images.shape[1:])))
        return splits


class Unrelabeled(ToyFaces):
    """Every keypoint is its own flip partner, so the left eye of a flipped cat is still called left."""

    def spec(self) -> DataSpec:
        spec = super().spec()
        return dataclasses.replace(spec, flip_pairs=tuple(range(len(spec.keypoints))))


class RowsFirst(ToyFaces):
    """Points are (y, x)."""

    def load(self) -> Splits:
        return {
            name: with_target(part, "points", part.targets["points"].flip(-1)) for name, part in super().load().items()
        }


class PointsFromZeroToOne(ToyFaces):
    """Points are relative to the image size instead of pixels, so the task scales them twice."""

    def load(self) -> Splits:
        return {
            name: with_target(part, "points", part.targets["points"] / (self.size - 1))
            for name, part in super().load().items()
        }


class NothingLabeled(ToyShapes):
    """Every pixel has the ignored id."""

    def spec(self) -> DataSpec:
        return dataclasses.replace(super().spec(), ignore_index=255)

    def load(self) -> Splits:
        return {
            name: with_target(part, "mask", torch.full_like(part.targets["mask"], 255))
            for name, part in super().load().items()
        }
