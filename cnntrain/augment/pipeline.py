"""The augmentation pipeline: one geometric transform, one color transform, then effects, on whole batches."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from cnntrain.augment.base import Augmentation, Color, Effect, Geometry
from cnntrain.augment.color import apply_color_matrix, compose, normalize
from cnntrain.augment.geometry import box_to_image
from cnntrain.augment.resample import (
    PADDING_MODES,
    GatherSampler,
    GridSampler,
    is_flipped,
    swap_flip_pairs,
    transform_points,
)
from cnntrain.augment.torchvision_transform import TorchvisionTransform, transform_sample
from cnntrain.errors import UserError, suggest
from cnntrain.randomness import uniform
from cnntrain.types import Batch, DataSpec, Size, concat_batches

# How many small batches are augmented at once: (batches, values of their images). Larger on CUDA, where launching a
# kernel takes as long as running it. 4 MiB and 64 MiB of float32.
MAX_GROUP = {"cpu": (4, 1 << 20), "cuda": (16, 1 << 24)}


class Pipeline:
    """Augment and normalize batches.

    Geometry is applied first, then color, then effects; each in the order of `augmentations`. The random numbers of an
    image are a function of (seed, epoch, position in the epoch, key). All geometric transforms are applied as one:
    nothing is cut off between a crop and a shift, and the border is visible only where the image has no pixel.

    Args:
        spec: metadata of the dataset. Images are normalized with its mean and std (without them, scaled to 0-1).
        augmentations: by YAML key.
        border: value outside an image: `zero` (black), `edge` or `reflect`; filled before colors are changed.

    Attributes:
        output_size: (height, width) in pixels of all returned batches.
        magnification: output pixels per image pixel, along one side, of the smallest random crop. Images may be loaded
            at a resolution higher by this factor, so that crops are not enlarged.
        can_flip: whether left and right may be exchanged.
        per_sample: transforms of torchvision, which the loader must apply to decoded images (`sample_transform`).
        mixes_labels: whether labels are mixed, so that training accuracy is meaningless.
    """

    def __init__(self, spec: DataSpec, augmentations: Mapping[str, Augmentation], border: str = "zero") -> None:
        self.spec = spec
        self.augmentations = dict(augmentations)
        self.border = border
        items = augmentations.items()
        self._geometries = {key: item for key, item in items if isinstance(item, Geometry)}
        self._colors = {key: item for key, item in items if isinstance(item, Color)}
        self._effects = {key: item for key, item in items if isinstance(item, Effect)}
        self.per_sample = {key: item for key, item in items if isinstance(item, TorchvisionTransform)}
        self._check()
        self.mean, self.std = spec.normalization
        self.can_flip = any(item.can_flip for item in self._geometries.values())
        self.mixes_labels = any(item.mixes_labels for item in self._effects.values())
        self._uses_mean = any(item.uses_mean for item in self._colors.values())
        # Depends on the settings, never on the drawn numbers: an image must not change the bits of another one.
        self._pixel_exact = all(item.pixel_exact for item in self._geometries.values())
        self._eval_matrix = torch.eye(3, dtype=torch.float64)
        self.output_size, self.magnification = spec.image_size, 1.0
        for item in self._geometries.values():
            if not self.per_sample:  # these come first, and may have sizes in pixels
                self.magnification *= max(1.0, item.magnification(*self.output_size))
            self._eval_matrix = item.eval_matrix(*self.output_size) @ self._eval_matrix
            self.output_size = item.output_size(*self.output_size)

    def __call__(self, batch: Batch, seed: int, epoch: int) -> Batch:
        """Return the augmented batch: images (N, C, H, W) float32, normalized; targets are transformed along."""

        def draw(key: str, item: Augmentation) -> Tensor:
            return uniform(seed, epoch, batch.position, key, item.num_uniforms)

        with torch.no_grad(), torch.autocast(batch.images.device.type, enabled=False):
            if self._geometries:
                matrix = self._draw_matrix(len(batch), draw)
                batch = self._transform(batch, matrix, self.output_size, self._pixel_exact)
            colors = compose(item.color_matrix(draw(key, item)) for key, item in self._colors.items())
            if colors is None:
                images = normalize(batch.images, self.mean, self.std)
            else:
                images = apply_color_matrix(batch.images, colors, self._uses_mean, self.mean, self.std)
            targets = batch.targets
            for key, item in self._effects.items():
                images, targets = item.apply(images, targets, draw(key, item), self.std)
        return replace(batch, images=images, targets=targets)

    def eval_transform(self, batch: Batch) -> Batch:
        """Return the batch normalized, without random augmentation, at the output size.

        Images with masks keep their size, because every pixel is evaluated.
        """
        with torch.no_grad(), torch.autocast(batch.images.device.type, enabled=False):
            matrix, resized = self._eval_matrix, self.output_size != self.spec.image_size
            if not self.spec.per_pixel and (resized or not torch.equal(matrix, torch.eye(3).double())):
                pixel_exact = torch.equal(matrix, matrix.round())
                matrix = matrix.repeat(len(batch), 1, 1)
                batch = self._transform(batch, matrix, self.output_size, pixel_exact)
            else:
                batch = self.resize(batch)
            return replace(batch, images=normalize(batch.images, self.mean, self.std))

    def resize(self, batch: Batch) -> Batch:
        """Return the batch at the image size of the dataset, in float32 if it was loaded at a higher resolution."""
        if _image_size(batch) == self.spec.image_size:
            return batch
        identity = torch.eye(3, dtype=torch.float64).repeat(len(batch), 1, 1)
        return self._transform(batch, identity, self.spec.image_size, pixel_exact=False)

    def augment_batches(
        self, batches: Iterable[Batch], seed: int, epoch: int, grouped: bool = False
    ) -> Iterator[Batch]:
        """Augment batches one by one; empty batches are passed through.

        Args:
            grouped: augment several small batches at once, because the time per call hardly depends on the number of
                images. The result is the same. Use it only if fetching the next batches early costs nothing.
        """
        group: list[Batch] = []
        for batch in batches:
            if not len(batch) or not grouped or self._effects:
                yield from self._augment_group(group, seed, epoch)
                group = []
                yield self(batch, seed, epoch) if len(batch) else batch
            else:
                if self._exceeds_group(group, batch):
                    yield from self._augment_group(group, seed, epoch)
                    group = []
                group.append(batch)
        yield from self._augment_group(group, seed, epoch)

    def _exceeds_group(self, group: list[Batch], batch: Batch) -> bool:
        """Return True if `batch` does not fit into `group`."""
        max_batches, max_values = MAX_GROUP.get(batch.images.device.type, MAX_GROUP["cpu"])
        pixels = max(math.prod(_image_size(batch)), math.prod(self.output_size))
        images = len(batch) + sum(len(other) for other in group)
        return len(group) == max_batches or images * self.spec.channels * pixels > max_values

    def _augment_group(self, group: list[Batch], seed: int, epoch: int) -> Iterator[Batch]:
        if group:
            augmented, start = self(concat_batches(group), seed, epoch), 0
            for batch in group:
                yield augmented.take(slice(start, start + len(batch)))
                start += len(batch)

    def sample_transform(self, seed: int, epoch: int) -> Callable[[Tensor, int], Tensor] | None:
        """Return the function of (image, position) to apply to decoded uint8 images; None if there is none."""
        return partial(transform_sample, self.per_sample, seed, epoch) if self.per_sample else None

    def _draw_matrix(self, count: int, draw: Callable[[str, Augmentation], Tensor]) -> Tensor:
        """Return the products of all geometric matrices (count, 3, 3) float64, from image to output pixels."""
        size = self.spec.image_size
        matrix = torch.eye(3, dtype=torch.float64).expand(count, 3, 3)
        for key, item in self._geometries.items():
            matrix = item.matrix(draw(key, item), *size) @ matrix
            size = item.output_size(*size)
        return matrix

    def _transform(self, batch: Batch, matrix: Tensor, output_size: Size, pixel_exact: bool) -> Batch:
        """Apply one matrix per image to images, keypoints, masks and `source_to_image`.

        Args:
            matrix: (N, 3, 3) float64, from pixels at the image size of the dataset to output pixels. Batches at
                another resolution are resized by the same resampling.
            pixel_exact: whether the matrix only flips and shifts by whole pixels.
        """
        size = _image_size(batch)
        if size != self.spec.image_size:
            whole = torch.tensor([[0, 0, size[1], size[0]]], dtype=torch.float64)
            matrix, pixel_exact = matrix @ box_to_image(whole, self.spec.image_size)[0], False
        sampler = (GatherSampler if pixel_exact else GridSampler)(
            matrix, size, output_size, self.border, batch.images.device
        )
        targets = dict(batch.targets)
        if "mask" in targets:
            targets["mask"] = sampler.masks(targets["mask"], self.spec.mask_fill)
        if "points" in targets:
            points, valid = targets["points"], targets["valid"]
            if self.spec.flip_pairs is not None:
                points, valid = swap_flip_pairs(points, valid, is_flipped(matrix, *size), self.spec.flip_pairs)
            targets["points"], targets["valid"] = transform_points(points, valid, matrix, output_size)
        source_to_image = matrix if batch.source_to_image is None else matrix @ batch.source_to_image
        images = sampler.images(batch.images)
        return replace(batch, images=images, targets=targets, source_to_image=source_to_image)

    def _check(self) -> None:
        for key, item in self.augmentations.items():
            if not isinstance(item, Augmentation):
                raise UserError(
                    f"augment.{key}: {type(item).__name__} is not an augmentation; derive it from Geometry, Color or "
                    "Effect in cnntrain.augment.base"
                )
        if not isinstance(self.border, str) or self.border not in PADDING_MODES:
            hint = suggest(self.border, tuple(PADDING_MODES))
            raise UserError(f"augment.border: {self.border!r} is not one of {', '.join(PADDING_MODES)}{hint}")
        self._check_targets()
        if self._colors and self.spec.channels not in (1, 3):
            raise UserError(
                f"augment.{next(iter(self._colors))}: color augmentations need images with 1 or 3 channels, these have "
                f"{self.spec.channels}; remove it"
            )

    def _check_targets(self) -> None:
        """Check that each target can follow the augmentations of the images."""
        targets = "keypoints" if self.spec.keypoints else "masks" if self.spec.per_pixel else None
        flips = [key for key, item in self._geometries.items() if item.can_flip]
        if self.spec.keypoints and flips and self.spec.flip_pairs is None:
            raise UserError(
                f"augment.{flips[0]} flips the image, but the left/right pairs of keypoints are not known, so that a "
                "left eye would still be called left; set data.flip_pairs, as in data.flip_pairs={left_eye: "
                f"right_eye}}, or remove augment.{flips[0]}"
            )
        if self.spec.keypoints and self.border == "reflect":
            raise UserError(
                "augment.border: reflect shows mirrored parts of the image without keypoints; use zero or edge"
            )
        mixing = [key for key, item in self._effects.items() if item.mixes_labels]
        if len(mixing) > 1:
            raise UserError(f"augment.{mixing[0]} and augment.{mixing[1]} both mix labels; choose one, or mixup_cutmix")
        if mixing and targets:
            raise UserError(
                f"augment.{mixing[0]} mixes class labels and cannot mix {targets}; remove augment.{mixing[0]}"
            )
        for key, item in self.per_sample.items():
            if targets and item.moves_pixels:
                raise UserError(
                    f"augment.{key}: torchvision's {item.name} may move pixels but not the {targets}; use a geometric "
                    "augmentation of cnntrain, or a transform that only changes colors"
                )


def _image_size(batch: Batch) -> Size:
    return batch.images.shape[-2], batch.images.shape[-1]
