"""Examples of one split: images, targets and names, decoded or still on disk."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from cnntrain.data.canvas import Box
from cnntrain.errors import UserError
from cnntrain.spec import DataSpec


class Decodes(Protocol):
    """Turns a file into uint8 pixels of one shape, and tells the matrix from source to canvas."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __call__(self, path: str, box: Box | None = None) -> tuple[Tensor, Tensor]: ...


@dataclass
class LazyImages:
    """Images (or masks) that stay in their files until they are asked for.

    Attributes:
        paths: N files.
        decoder: turns a file into pixels.
        boxes: (N, 4) float64 left, top, right, bottom to cut out, in source pixels counted from the image's
            edge; None for whole images.
    """

    paths: list[str]
    decoder: Decodes
    boxes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all of them decoded: (N, C, H, W), masks (N, H, W)."""
        return len(self), *self.decoder.shape

    def __getitem__(self, index: int) -> Tensor:
        return self.read(index)[0]

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """The image, uint8 (C, H, W), and the matrix from source to canvas, float64 (3, 3).

        Raises:
            BadFile: the file can't be used.
        """
        if self.boxes is None:
            return self.decoder(self.paths[index])
        left, top, right, bottom = self.boxes[index].tolist()
        return self.decoder(self.paths[index], (left, top, right, bottom))

    def subset(self, indices: Tensor) -> "LazyImages":
        paths = [self.paths[i] for i in indices.tolist()]
        return LazyImages(paths, self.decoder, None if self.boxes is None else self.boxes[indices])


@dataclass
class Examples:
    """N examples.

    Attributes:
        images: uint8 (N, C, H, W), or `LazyImages`.
        targets: as in `Batch.targets`.
        names: what a person calls each example: its file, or 'train/00012'.
        groups: examples of one group (one patient, one photograph) never part; None: each on its own.
        to_canvas: (N, 3, 3) float64 matrices from source pixels to the canvas; None: identity, or not known
            before the images are decoded.
        lazy_targets: targets that stay in files as the images do (masks); they join `targets` when decoded.
    """

    images: Tensor | LazyImages
    targets: dict[str, Tensor]
    names: list[str]
    groups: list[str] | None = None
    to_canvas: Tensor | None = None
    lazy_targets: dict[str, LazyImages] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, indices: Tensor | Sequence[int]) -> "Examples":
        """The examples at `indices`, in that order."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        images = self.images.subset(rows) if isinstance(self.images, LazyImages) else self.images[rows]
        picked = rows.tolist()
        return replace(
            self,
            images=images,
            targets={name: target[rows] for name, target in self.targets.items()},
            names=[self.names[i] for i in picked],
            groups=None if self.groups is None else [self.groups[i] for i in picked],
            to_canvas=None if self.to_canvas is None else self.to_canvas[rows],
            lazy_targets={name: lazy.subset(rows) for name, lazy in self.lazy_targets.items()},
        )

    def fingerprint(self) -> str:
        """'count-hash' over names and targets: points to 0.01 px, masks by their names only."""
        digest = hashlib.sha256("\0".join(self.names).encode(errors="surrogateescape"))
        for name, target in sorted(self.targets.items()):
            if name == "mask":
                continue
            values = (target.double() * 100).round() if target.is_floating_point() else target
            digest.update(name.encode() + values.to(torch.int64).contiguous().numpy().tobytes())
        return f"{len(self)}-{digest.hexdigest()[:16]}"


def check_examples(split: str, examples: Examples, spec: DataSpec) -> None:
    """Refuse examples that are not what their data set says of itself: those of a source of one's own may be anything.

    Raises:
        UserError: names the split and what is wrong.
    """
    images, count = examples.images, len(examples)
    shape = (count, spec.channels, spec.height, spec.width)
    if tuple(images.shape) != shape or (isinstance(images, Tensor) and images.dtype != torch.uint8):
        kind = images.dtype if isinstance(images, Tensor) else "files"
        raise UserError(
            f"data: the {split} images are {kind} {tuple(images.shape)}; expected uint8 {shape}, as spec() says"
        )
    for name, target in examples.targets.items():
        if len(target) != count:
            raise UserError(f"data: the {split} split has {count} images and {len(target)} of {name!r}")
    if "mask" in {**examples.targets, **examples.lazy_targets} and not spec.per_pixel:
        raise UserError(f"data: the {split} split has masks; spec() must say per_pixel=True")
    label = examples.targets.get("label")
    if label is not None and label.dtype == torch.int64 and spec.classes:
        wrong = ((label < 0) | (label >= len(spec.classes))).nonzero().flatten().tolist()
        if wrong:
            shown = ", ".join(f"{int(label[row])} ({examples.names[row]})" for row in wrong[:5])
            raise UserError(
                f"data: {len(wrong)} of {count} {split} labels are out of range, 0 to {len(spec.classes) - 1}: {shown}"
            )
