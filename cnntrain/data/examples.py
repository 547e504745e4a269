"""Examples of a split (images, targets, names), and the base class of data sources."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from cnntrain.data.decoder import Box
from cnntrain.errors import UserError
from cnntrain.types import DataSpec


class Decoder(Protocol):
    """Decode a file to uint8 pixels of a fixed shape, and return the matrix from source to target pixels."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __call__(self, path: str, box: Box | None = None) -> tuple[Tensor, Tensor]: ...


@dataclass
class LazyImages:
    """Images (or masks) that are decoded on access."""

    paths: list[str]  # N files
    decoder: Decoder
    # (N, 4) float64: left, top, right, bottom of crops in source pixels, from the image's edge; None: whole images
    boxes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of all decoded images: (N, C, H, W), of masks (N, H, W)."""
        return len(self), *self.decoder.shape

    def __getitem__(self, index: int) -> Tensor:
        return self.read(index)[0]

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Return uint8 (C, H, W), and the (3, 3) float64 matrix from source to target pixels; may raise BadFile."""
        return self.decoder(self.paths[index], self.box(index))

    def box(self, index: int) -> Box | None:
        if self.boxes is None:
            return None
        left, top, right, bottom = self.boxes[index].tolist()
        return left, top, right, bottom

    def subset(self, rows: Tensor) -> "LazyImages":
        paths = [self.paths[i] for i in rows.tolist()]
        return LazyImages(paths, self.decoder, None if self.boxes is None else self.boxes[rows])


@dataclass
class Examples:
    """N examples."""

    images: Tensor | LazyImages  # uint8 (N, C, H, W)
    targets: dict[str, Tensor]  # as in `Batch.targets`
    names: list[str]  # for messages and reports: the file of each example, or 'train/00012'
    groups: list[str] | None = None  # of each example; a group (for example a patient) is never split
    # (N, 3, 3) float64, from source to image pixels; None: identity, or unknown until the images are decoded
    source_to_image: Tensor | None = None
    lazy_targets: dict[str, LazyImages] = field(default_factory=dict)  # masks; they join `targets` when decoded

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, rows: Tensor | Sequence[int]) -> "Examples":
        """Return the examples at `rows`, in that order."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        indices = rows.tolist()
        return replace(
            self,
            images=self.images.subset(rows) if isinstance(self.images, LazyImages) else self.images[rows],
            targets={name: target[rows] for name, target in self.targets.items()},
            names=[self.names[i] for i in indices],
            groups=None if self.groups is None else [self.groups[i] for i in indices],
            source_to_image=None if self.source_to_image is None else self.source_to_image[rows],
            lazy_targets={name: lazy.subset(rows) for name, lazy in self.lazy_targets.items()},
        )

    def lazy_images(self) -> list[LazyImages]:
        """Return the images and masks that are not decoded yet."""
        images = [self.images] if isinstance(self.images, LazyImages) else []
        return images + list(self.lazy_targets.values())

    def decoded_bytes(self) -> int:
        """Return the size of all images and masks after decoding."""
        masks = [*self.lazy_targets.values(), *(t for name, t in self.targets.items() if name == "mask")]
        return sum(math.prod(images.shape) for images in (self.images, *masks))

    def fingerprint(self) -> str:
        """Return 'count-hash' of names and targets: points to 0.01 px, masks by the names only."""
        digest = hashlib.sha256("\0".join(self.names).encode(errors="surrogateescape"))
        for name, target in sorted(self.targets.items()):
            if name == "mask":
                continue
            values = (target.double() * 100).round() if target.is_floating_point() else target
            digest.update(name.encode() + values.to(torch.int64).contiguous().numpy().tobytes())
        return f"{len(self)}-{digest.hexdigest()[:16]}"


def evenly_spaced(count: int, sample: int) -> list[int]:
    """Return the rows of at most `sample` of `count` examples, from the first to the last."""
    return torch.linspace(0, count - 1, min(count, sample), dtype=torch.float64).round().long().tolist()


def lazy_images_of(splits: Mapping[str, Examples]) -> list[LazyImages]:
    """Return all images and masks that are not decoded yet."""
    return [lazy for examples in splits.values() for lazy in examples.lazy_images()]


class Source(ABC):
    """Base class of data sources: one class per file format, one YAML file per dataset.

    If the data are missing or invalid, the methods raise `UserError`.
    """

    downloads = True  # whether missing files may be downloaded

    @abstractmethod
    def spec(self) -> DataSpec:
        """Return the metadata. May list folders and read tables, but must not decode images."""

    @abstractmethod
    def load(self) -> dict[str, Examples]:
        """Return the examples by split: 'train', and optionally 'val' and 'test'. Errors list all bad files."""


def check_examples(split: str, examples: Examples, spec: DataSpec) -> Examples:
    """Validate the examples of a user-defined source and convert targets to the form that tasks need.

    Unambiguous targets are converted: numpy arrays and lists; labels of other integer types, as whole floats, of shape
    (N, 1) or one-hot (N, C); masks of other integer types; points of other number types.
    """
    images, count = examples.images, len(examples)
    if not isinstance(images, Tensor | LazyImages):
        images = _as_tensor(images, f"the {split} images")
    if len(images) != count:
        raise UserError(f"data: {split} has {len(images)} images and {count} names; the numbers must be equal")
    shape = (count, spec.channels, spec.height, spec.width)
    if tuple(images.shape) != shape or (isinstance(images, Tensor) and images.dtype != torch.uint8):
        kind = images.dtype if isinstance(images, Tensor) else "files"
        raise UserError(
            f"data: the {split} images are {kind} {tuple(images.shape)}; expected uint8 {shape}, as spec() says"
        )
    targets = {name: _as_tensor(target, f"{name!r} of the {split} split") for name, target in examples.targets.items()}
    for name, target in targets.items():
        if target.dim() == 0 or len(target) != count:
            found = len(target) if target.dim() else "a single number"
            raise UserError(f"data: the {split} split has {count} images and {found} of {name!r}")
    all_targets = {**targets, **examples.lazy_targets}
    if "mask" in all_targets and not spec.per_pixel:
        raise UserError(f"data: the {split} split has masks; spec() must say per_pixel=True")
    needed = "points" if spec.keypoints else "mask" if spec.per_pixel else "label" if spec.classes else None
    if needed is not None and needed not in all_targets:
        has = ", ".join(map(repr, all_targets)) or "none"
        raise UserError(f"data: the {split} split needs the target {needed!r} according to spec(), but has {has}")
    if "label" in targets and spec.classes:
        targets["label"] = _labels(targets["label"], split, examples.names, len(spec.classes))
    if "mask" in targets:
        targets["mask"] = _masks(targets["mask"], split, spec)
    if "points" in targets:
        targets |= _points(targets, split, spec)
    return replace(examples, images=images, targets=targets)


def _as_tensor(values: Any, what: str) -> Tensor:
    if isinstance(values, Tensor):
        return values
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(values).__name__
        raise UserError(f"data: {what}: cannot convert {kind} to a tensor ({error})") from error


def _labels(label: Tensor, split: str, names: Sequence[str], classes: int) -> Tensor:
    """Return labels as (N,) int64; check their range."""
    shape, kind = tuple(label.shape), label.dtype
    remedy = f"labels must be int64 (N,), the class index of each image; the {split} labels are {kind} {shape}"
    if label.dim() == 2 and label.shape[1] == 1:
        label = label[:, 0]
    elif label.dim() == 2 and label.shape[1] == classes and not label.is_complex():
        is_one_hot = ((label == 0) | (label == 1)).all() and (label.double().sum(1) == 1).all()
        label = label.long().argmax(1) if is_one_hot else label
    if label.dim() != 1:
        hint = "; for one-hot rows or scores use .argmax(1)" if label.dim() == 2 else ""
        raise UserError(f"data: {remedy}{hint}")
    if label.is_complex() or (label.is_floating_point() and not (label.isfinite() & (label == label.round())).all()):
        raise UserError(f"data: {remedy}, and not whole numbers")
    label = label.to(torch.int64)
    wrong = ((label < 0) | (label >= classes)).nonzero().flatten().tolist()
    if wrong:
        shown = ", ".join(f"{int(label[row])} ({names[row]})" for row in wrong[:5])
        raise UserError(
            f"data: {len(wrong)} of {len(label)} {split} labels are out of range, 0 to {classes - 1}: {shown}"
        )
    return label


def _masks(mask: Tensor, split: str, spec: DataSpec) -> Tensor:
    """Return masks as (N, H, W) uint8; check their values."""
    remedy = f"masks must be uint8 (N, {spec.height}, {spec.width}), the class index of each pixel"
    if mask.dim() == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if tuple(mask.shape[1:]) != spec.image_size or mask.is_floating_point() or mask.is_complex():
        raise UserError(f"data: the {split} masks are {mask.dtype} {tuple(mask.shape)}; {remedy}")
    if mask.numel() and not 0 <= int(mask.min()) <= int(mask.max()) <= 255:
        raise UserError(f"data: the {split} masks have values from {int(mask.min())} to {int(mask.max())}; {remedy}")
    mask = mask.to(torch.uint8)
    found = torch.bincount(mask.flatten(), minlength=256).nonzero().flatten().tolist()
    wrong = [value for value in found if value >= len(spec.classes) and value != spec.mask_fill]
    if wrong:
        raise UserError(
            f"data: the {split} masks have the values {', '.join(map(str, wrong[:8]))}; the classes are 0 to "
            f"{len(spec.classes) - 1}, and {spec.mask_fill} is ignored"
        )
    return mask


def _points(targets: dict[str, Tensor], split: str, spec: DataSpec) -> dict[str, Tensor]:
    """Return `points` (N, K, 2) float32 and `valid` (N, K) bool, which is True by default."""
    points = targets["points"]
    shape = (len(points), len(spec.keypoints), 2)
    if tuple(points.shape) != shape or points.is_complex():
        raise UserError(
            f"data: the {split} points are {points.dtype} {tuple(points.shape)}; expected float32 {shape}, x and y of "
            f"the {shape[1]} keypoints in pixels of the resized image"
        )
    if "visible" in targets:  # an earlier name; ignoring it would make all points valid
        raise UserError(f"data: rename the target 'visible' of the {split} split to 'valid'")
    valid = targets.get("valid", torch.ones(shape[:2], dtype=torch.bool))
    if tuple(valid.shape) != shape[:2] or not ((valid == 0) | (valid == 1)).all():
        raise UserError(f"data: 'valid' of the {split} split must be bool {shape[:2]}")
    points, valid = points.float(), valid.bool()
    if not points[valid].isfinite().all():
        raise UserError(f"data: some {split} points are valid but not finite; 'valid' must be False for them")
    return {"points": torch.where(valid[..., None], points, 0.0), "valid": valid}
