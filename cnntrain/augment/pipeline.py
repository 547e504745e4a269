"""All augmentations of a run, on whole batches: one move, one change of color, then effects."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from cnntrain.augment.base import Augmentation, Color, Effect, Geometry, by_kind
from cnntrain.augment.color import chain
from cnntrain.augment.paint import normalize, paint
from cnntrain.augment.points import is_mirrored, move_points
from cnntrain.augment.resample import BORDERS, Gather, GridResample
from cnntrain.augment.torchvision_transform import SampleTransform, TorchvisionTransform
from cnntrain.errors import UserError, suggest
from cnntrain.randomness import uniform
from cnntrain.types import Batch, DataSpec, concat_batches

# What is augmented at once, where batches are small: so many of them, and so many pixel values (4 MiB of float32).
MOST_BATCHES = 4
MOST_TOGETHER = 1 << 20
# On CUDA, where a kernel takes as long to launch as to run: 64 MiB.
MOST_BATCHES_ON_CUDA = 16
MOST_TOGETHER_ON_CUDA = 1 << 24


class Pipeline:
    """Augments and normalizes batches.

    Geometry comes first, then color, then effects; within each kind the order is that of `augmentations`,
    whose keys name the draws: what an image gets is a function of (seed, epoch, position in the epoch, key).
    All moves are one move: nothing is cut off between a crop and a shift, and the border shows only where the
    store has no pixel.

    Args:
        spec: facts about the images; its mean and std normalize (without them images stay on the 0-1 scale).
        augmentations: by YAML key.
        border: what lies outside an image: `zero` (black), `edge` or `reflect`; filled before colors change.
        canvas: (height, width) that the images are resized to in the end; None keeps what the augmentations
            give.

    Attributes:
        output_size: (height, width) in pixels of every batch that comes out.
        magnification: output pixels per pixel of the data's canvas, along one side, of the smallest random crop. Images
            may come on a canvas that is finer by this: a crop then has pixels of its own, instead of being blown up.
        mirrors: whether left may become right.
        per_sample: transforms of torchvision, which the store must apply where it decodes
            (`sample_transform`).
        mixes_labels: whether targets come out mixed, so that training accuracy says nothing.

    Raises:
        UserError: augmentations that don't fit each other or the data; the message names the keys.
    """

    def __init__(
        self,
        spec: DataSpec,
        augmentations: Mapping[str, Augmentation],
        border: str = "zero",
        canvas: tuple[int, int] | None = None,
    ) -> None:
        self.spec = spec
        self.augmentations = dict(augmentations)
        self.border = border
        self._geometries = cast("dict[str, Geometry]", by_kind(augmentations, Geometry))
        self._colors = cast("dict[str, Color]", by_kind(augmentations, Color))
        self._effects = cast("dict[str, Effect]", by_kind(augmentations, Effect))
        self.per_sample = cast(
            "dict[str, TorchvisionTransform]", by_kind(augmentations, TorchvisionTransform)
        )
        self.mirrors = any(item.mirrors for item in self._geometries.values())
        self.mixes_labels = any(item.mixes_labels for item in self._effects.values())
        self.mean = spec.mean or (0.0,) * spec.channels
        self.std = spec.std or (1.0,) * spec.channels
        self._check()
        size = spec.image_size
        rest = torch.eye(3, dtype=torch.float64)
        self.magnification = 1.0
        for item in self._geometries.values():
            if not self.per_sample:  # which come first, and may tell sizes in pixels
                self.magnification *= max(1.0, item.magnification(*size))
            rest = item.rest(*size) @ rest
            size = item.output_size(*size)
        self._resize = None if canvas in (None, size) else resize_matrix(size, canvas)
        if self._resize is not None:
            rest = self._resize @ rest
        self.output_size = canvas or size
        self._rest = rest
        # Chosen from what is configured, never from what was drawn: no image may change another one's bits.
        self._whole_pixel = self._resize is None and all(
            item.whole_pixel for item in self._geometries.values()
        )

    def __call__(self, batch: Batch, seed: int, epoch: int) -> Batch:
        """The batch augmented: images (N, C, H, W) float32 normalized; targets and `source_to_image` move along."""

        def draw(key: str, item: Augmentation) -> Tensor:
            return uniform(seed, epoch, batch.position, key, item.draws)

        device_type = batch.images.device.type
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            if self._geometries or self._resize is not None:
                batch = self._move(batch, self._matrices(len(batch), draw), self._whole_pixel)
            color: Tensor | None = None
            for key, item in self._colors.items():
                matrix = item.paint(draw(key, item))
                color = matrix if color is None else chain(color, matrix)
            if color is None:
                images = normalize(batch.images, self.mean, self.std)
            else:
                uses_mean = any(item.uses_mean for item in self._colors.values())
                images = paint(batch.images, color, uses_mean, self.mean, self.std)
            targets = batch.targets
            for key, item in self._effects.items():
                images, targets = item.apply(images, targets, draw(key, item), self.std)
        return replace(batch, images=images, targets=targets)

    def each(
        self, batches: Iterable[Batch], seed: int, epoch: int, together: bool = False
    ) -> Iterator[Batch]:
        """Every batch augmented, as by itself; what has no images is passed on.

        Args:
            together: small batches are augmented several at a time, for the draws and matrices of few images take as
                long as those of many. For batches that cost nothing to fetch: the next ones are asked for beforehand.
        """
        if not together or self._effects:
            return (self(batch, seed, epoch) if len(batch) else batch for batch in batches)
        return self._groups(batches, seed, epoch)

    def _groups(self, batches: Iterable[Batch], seed: int, epoch: int) -> Iterator[Batch]:
        group: list[Batch] = []
        most_images, most_batches = 0, MOST_BATCHES
        for batch in batches:
            if not group and len(batch):
                on_cuda = batch.images.device.type == "cuda"
                most_batches = MOST_BATCHES_ON_CUDA if on_cuda else MOST_BATCHES
                most_values = MOST_TOGETHER_ON_CUDA if on_cuda else MOST_TOGETHER
                pixels = max(math.prod(_size(batch)), math.prod(self.output_size))
                most_images = most_values // (self.spec.channels * pixels)
            if group and (
                len(group) == most_batches
                or not len(batch)
                or sum(len(each) for each in group) + len(batch) > most_images
            ):
                yield from self._together(group, seed, epoch)
                group = []
            if len(batch):
                group.append(batch)
            else:
                yield batch
        if group:
            yield from self._together(group, seed, epoch)

    def _together(self, group: list[Batch], seed: int, epoch: int) -> Iterator[Batch]:
        augmented, start = self(concat_batches(group), seed, epoch), 0
        for count in [len(batch) for batch in group]:
            yield augmented.take(slice(start, start + count))
            start += count

    def sample_transform(self, seed: int, epoch: int) -> SampleTransform | None:
        """What is done to each decoded uint8 image, f(image, position); None for most runs."""
        return SampleTransform(self.per_sample, seed, epoch) if self.per_sample else None

    def plain(self, batch: Batch) -> Batch:
        """The batch normalized, with nothing random done to it.

        It is on the same canvas as the augmented ones; images with masks, whose every pixel is judged, stay whole.
        """
        with torch.no_grad(), torch.autocast(batch.images.device.type, enabled=False):
            moves = self.output_size != self.spec.image_size or not torch.equal(
                self._rest, torch.eye(3).double()
            )
            if moves and not self.spec.per_pixel:
                whole_pixel = bool(torch.equal(self._rest, self._rest.round())) and self._resize is None
                batch = self._move(batch, self._rest.repeat(len(batch), 1, 1), whole_pixel)
            else:
                batch = self.on_canvas(batch)
            return replace(batch, images=normalize(batch.images, self.mean, self.std))

    def on_canvas(self, batch: Batch) -> Batch:
        """The batch on the data's canvas; unchanged where it is, in float32 where it came on a finer one."""
        if _size(batch) == self.spec.image_size:
            return batch
        unmoved = torch.eye(3, dtype=torch.float64).repeat(len(batch), 1, 1)
        return self._move(batch, unmoved, False, self.spec.image_size)

    def _matrices(self, count: int, draw: Callable[[str, Augmentation], Tensor]) -> Tensor:
        """(count, 3, 3) float64: the product of all geometry, from the data's canvas to output pixels."""
        size = self.spec.image_size
        matrix = torch.eye(3, dtype=torch.float64).expand(count, 3, 3)
        for key, item in self._geometries.items():
            matrix = item.move(draw(key, item), *size) @ matrix
            size = item.output_size(*size)
        return matrix if self._resize is None else self._resize @ matrix

    def _move(
        self, batch: Batch, matrix: Tensor, whole_pixel: bool, output_size: tuple[int, int] | None = None
    ) -> Batch:
        """Images, points and masks moved by one matrix each; the way back to the source file too.

        Args:
            matrix: (N, 3, 3) float64, from the data's canvas to the output, whatever canvas the batch is on.
            output_size: (height, width) in pixels; None: of all batches.
        """
        size, device = _size(batch), batch.images.device
        output_size = output_size or self.output_size
        if size != self.spec.image_size:
            matrix, whole_pixel = matrix @ resize_matrix(size, self.spec.image_size), False
        mover = (Gather if whole_pixel else GridResample)(matrix, size, output_size, self.border, device)
        targets = dict(batch.targets)
        if "mask" in targets:
            targets["mask"] = mover.mask(targets["mask"], self.spec.mask_fill)
        if "points" in targets:
            targets["points"], targets["valid"] = move_points(
                targets["points"],
                targets["valid"],
                matrix,
                is_mirrored(matrix, *size),
                self.spec.flip_pairs,
                output_size,
            )
        source_to_image = matrix if batch.source_to_image is None else matrix @ batch.source_to_image
        return replace(
            batch, images=mover.images(batch.images), targets=targets, source_to_image=source_to_image
        )

    def _check(self) -> None:
        for key, item in self.augmentations.items():
            if not isinstance(item, Augmentation):
                raise UserError(
                    f"augment.{key}: {type(item).__name__} is no augmentation; derive it from Geometry, "
                    f"Color or Effect of cnntrain.augment.base"
                )
        if not isinstance(self.border, str) or self.border not in BORDERS:
            near = suggest(self.border, tuple(BORDERS))
            raise UserError(f"augment.border: {self.border!r} is none of {', '.join(BORDERS)}{near}")
        if self.spec.keypoints:
            self._check_keypoints()
        what = "keypoints" if self.spec.keypoints else "masks" if self.spec.per_pixel else None
        mixing = [key for key, item in self._effects.items() if item.mixes_labels]
        if len(mixing) > 1:
            raise UserError(
                f"augment.{mixing[0]} and augment.{mixing[1]} both mix labels; choose one, or mixup_cutmix"
            )
        if mixing and what:
            raise UserError(f"augment.{mixing[0]} mixes labels, and {what} are none; take it out")
        for key, item in self.per_sample.items():
            if item.moves_pixels and what:
                raise UserError(
                    f"augment.{key}: torchvision's {item.name} may move pixels and would leave the {what} where "
                    "they were; use cnntrain's own geometry, or one that only changes colors"
                )
        if self._colors and self.spec.channels not in (1, 3):
            raise UserError(
                f"augment.{next(iter(self._colors))}: colors need images of 1 or 3 channels, these have "
                f"{self.spec.channels}; take it out"
            )

    def _check_keypoints(self) -> None:
        mirroring = [key for key, item in self._geometries.items() if item.mirrors]
        if mirroring and self.spec.flip_pairs is None:
            raise UserError(
                f"augment.{mirroring[0]} mirrors the image, but data.flip_pairs does not say which points trade "
                f"names: a mirrored left eye would go on being called left. Set data.flip_pairs, as in "
                f"data.flip_pairs={{left_eye: right_eye}}, or take augment.{mirroring[0]} out"
            )
        if self.border == "reflect":
            raise UserError(
                "augment.border: reflect shows mirrored parts of the image that have no keypoints; use zero or edge"
            )


def _size(batch: Batch) -> tuple[int, int]:
    """(height, width) in pixels."""
    return batch.images.shape[-2], batch.images.shape[-1]


def resize_matrix(size: tuple[int, int], output_size: tuple[int, int]) -> Tensor:
    """(3, 3) float64 that stretches height x width px over `output_size`, edges (not centers) onto edges."""
    scale_y, scale_x = (after / before for before, after in zip(size, output_size, strict=True))
    return torch.tensor(
        [[scale_x, 0, (scale_x - 1) / 2], [0, scale_y, (scale_y - 1) / 2], [0, 0, 1]], dtype=torch.float64
    )
