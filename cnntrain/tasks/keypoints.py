"""K named points per image: direct regression or heat maps, judged in pixels of the source image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cnntrain.errors import UserError, suggest
from cnntrain.plots import images as drawing
from cnntrain.plots import overlays
from cnntrain.tasks import heatmaps
from cnntrain.tasks.arguments import choice, number
from cnntrain.tasks.keypoint_meter import KeypointMeter
from cnntrain.tasks.meter import Meter, ratio, wide_dtype
from cnntrain.tasks.regression import make_distance
from cnntrain.tasks.source_pixels import source_pixels_per_canvas_pixel, unmap_points
from cnntrain.tasks.task import Targets, Task
from cnntrain.transfer import constant
from cnntrain.types import DataSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEARNED_ERROR = 0.02  # half canvases
SMALLEST_SIZE = 0.05  # that an error is divided by: share of the canvas's longer side


class Keypoints(Task):
    """Where K points are. Points that are not valid (unlabeled, or off the canvas) count nowhere.

    Targets: `points` (N, K, 2) canvas pixels (x, y), `valid` (N, K) bool, and for figures in the pixels of
    the source image `source_to_image` (N, 3, 3), source to canvas, of any float type on any device (none: the
    identity); where the data have them `box_size` (N, 2), width and height of the annotated boxes in source pixels.

    With `head='regression'` the model gives (N, 2K): x and y of each point from the canvas's center, in units
    of half its longer side, so that a flip changes a sign and zero is the center. With `head='heatmap'` it
    gives maps (N, K, h, w) that cover the canvas corner to corner.

    Args:
        spec: facts of the data; its size must be that of the canvas that the model sees.
        head: 'regression' or 'heatmap'.
        loss: 'auto', 'mse', 'l1', 'smooth_l1' or 'wing'. Auto is wing for regression; for heat maps it is the
            Kullback-Leibler divergence of the softmax over cells from a Gaussian, and 'mse' the classical
            mean squared difference from a Gaussian of height 1 (Tompson et al. 2014).
        smooth_l1_beta, wing_width, wing_curvature: constants of those losses, in units of half the canvas.
        heatmap_sigma: the Gaussian's standard deviation in cells of the map.
        normalize_by: what NME and PCK divide errors by: 'box', the object's size (see `object_sizes`), or the distance
            of two named points, e.g. the outer eye corners. It counts as 1/20 of the canvas's longer side at least, so
            that no single object outweighs all others.

    Raises:
        UserError: the data has no keypoints, or an argument is wrong.
    """

    def __init__(
        self,
        spec: DataSpec,
        head: str = "regression",
        loss: str = "auto",
        smooth_l1_beta: float = 0.1,
        wing_width: float = 0.08,
        wing_curvature: float = 0.016,
        heatmap_sigma: float = 1.5,
        normalize_by: str | Sequence[str] = "box",
    ) -> None:
        super().__init__(spec)
        if not spec.keypoints:
            raise UserError("task: keypoints needs data that names keypoints; try data=toy_faces")
        self.head = choice("task.head", head, ("regression", "heatmap"))
        names = ("auto", "mse", "l1", "smooth_l1", "wing") if head == "regression" else ("auto", "mse")
        self.loss_name = choice(f"task.loss (with task.head={head})", loss, names)
        beta = number("task.smooth_l1_beta", smooth_l1_beta, 0.0, open_low=True)
        width = number("task.wing_width", wing_width, 0.0, open_low=True)
        curvature = number("task.wing_curvature", wing_curvature, 0.0, open_low=True)
        self.sigma = number("task.heatmap_sigma", heatmap_sigma, 0.0, open_low=True)
        if head == "regression":
            name = "wing" if loss == "auto" else loss
            self._distance = make_distance(name, beta, width, curvature)
        self._pair = _named_pair(normalize_by, spec.keypoints)
        self.num_outputs = len(spec.keypoints) * (2 if head == "regression" else 1)
        self.monitor = ("nme", "min")
        self.monitor_range = (0.0, math.inf)

    def normalized(self, points: Tensor) -> Tensor:
        """Canvas pixels -> units of half the canvas from its center; (..., 2)."""
        center, half = self._frame(points)
        return (points - center) / half

    def _frame(self, like: Tensor) -> tuple[Tensor, float]:
        height, width = self.spec.image_size
        center = constant(((width - 1) / 2, (height - 1) / 2), like.device, like.dtype)
        return center, max(height - 1, width - 1, 1) / 2

    def points(self, outputs: Tensor) -> Tensor:
        """The answer in canvas pixels: (N, K, 2) float32 as (x, y)."""
        outputs = outputs.float()
        if self.head == "regression":
            coordinates = outputs.reshape(len(outputs), len(self.spec.keypoints), 2)  # (N,2K) -> (N,K,2)
            center, half = self._frame(coordinates)
            return coordinates * half + center
        log_heat = outputs if self.loss_name == "auto" else outputs.clamp(min=1e-6).log()
        cells = (outputs.shape[-2], outputs.shape[-1])
        return heatmaps.to_pixels(heatmaps.decode(log_heat), self.spec.image_size, cells)

    def losses(self, outputs: Tensor, targets: Targets, plain: bool = False) -> tuple[Tensor, Tensor]:
        valid = targets["valid"].bool()
        # Where nothing is known anything may stand, NaN too: it must not reach the arithmetic.
        true = torch.where(valid[..., None], targets["points"].float(), 0.0)
        if self.head == "regression":
            coordinates = outputs.float().reshape(true.shape)  # (N,2K) -> (N,K,2)
            error = torch.where(valid[..., None], coordinates - self.normalized(true), 0.0)
            per_point = self._distance(error).mean(2)
        else:
            per_point = torch.where(valid, self._heatmap_losses(outputs.float(), true), 0.0)
        return per_point.sum(1), valid.sum(1).float()

    def _heatmap_losses(self, outputs: Tensor, true: Tensor) -> Tensor:
        """(N, K) from maps (N, K, h, w) and points in canvas pixels."""
        cells = (outputs.shape[-2], outputs.shape[-1])
        log_target = heatmaps.log_gaussian(
            heatmaps.to_cells(true, self.spec.image_size, cells), cells, self.sigma
        )
        if self.loss_name == "mse":
            return (outputs - log_target.exp()).square().mean((2, 3))
        log_target = log_target.flatten(2).log_softmax(2)
        return (log_target.exp() * (log_target - outputs.flatten(2).log_softmax(2))).sum(2)

    def min_loss(self, plain: bool = False) -> float:
        return 0.0

    def learned_loss(self, uninformed: float) -> float:
        """Of coordinates, what an error of 1 % of the canvas costs: losses differ too much near zero for a share."""
        if self.head == "heatmap":
            return super().learned_loss(uninformed)
        return float(self._distance(torch.tensor(LEARNED_ERROR)))

    def output_shape(self) -> tuple[int | None, ...]:
        return (self.num_outputs, None, None) if self.head == "heatmap" else (self.num_outputs,)

    def prepare(self, targets: Targets) -> None:
        if "valid" in targets and not targets["valid"].any():
            raise UserError("data: no training image has a point that is labeled and on the canvas")

    def zero_outputs(self, targets: Targets) -> Tensor:
        """Heat maps of a quarter of the canvas: pass a model's own outputs where their size matters."""
        shape = [len(targets["points"]), self.num_outputs]
        if self.head == "heatmap":
            shape += [-(-side // 4) for side in self.spec.image_size]
        return torch.zeros(shape, device=targets["points"].device)

    def source_points(self, points: Tensor, targets: Targets) -> Tensor:
        """Canvas pixels -> pixels of the source images, (N, K, 2), in float64 where the device has it."""
        points = points.to(wide_dtype(points.device))
        matrix = targets.get("source_to_image")
        return points if matrix is None else unmap_points(points, matrix)

    def errors(self, outputs: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """Errors in source pixels (N, K), which of them count (N, K) bool, and what normalizes them (N,).

        The norm is 0 where it is not known: fewer than two valid points and no annotated box, or one of the pair not
        valid.
        """
        valid = targets["valid"].bool()
        true = torch.where(valid[..., None], targets["points"].float(), 0.0)
        both = self.source_points(
            torch.cat([true, self.points(outputs)], 1), targets
        )  # the way back is found once
        true, predicted = both.split(true.shape[1], dim=1)
        error = (predicted - true).norm(dim=2)
        if self._pair:
            a, b = self._pair
            norm, known = (true[:, a] - true[:, b]).norm(dim=1), valid[:, a] & valid[:, b]
        else:
            norm, known = object_sizes(true, valid, targets.get("box_size"))
        least = SMALLEST_SIZE * max(self.spec.image_size)
        matrix = targets.get("source_to_image")
        if matrix is not None:
            least = least * source_pixels_per_canvas_pixel(matrix, norm.device, norm.dtype)
        norm = torch.where(known, norm.clamp(min=least), 0.0)
        return torch.where(valid, error, 0.0), valid, norm

    def meter(self) -> KeypointMeter:
        return KeypointMeter(self.spec.keypoints, self.errors)

    @torch.no_grad()
    def answers(self, outputs: Tensor, targets: Targets) -> list[dict[str, object]]:
        """`<name>_x` and `<name>_y` of every point, in pixels of the source image."""
        points = self.source_points(self.points(outputs), targets).tolist()
        return [_columns(self.spec.keypoints, row) for row in points]

    @torch.no_grad()
    def rows(self, outputs: Tensor, targets: Targets) -> list[dict[str, object]]:
        """`valid` (how many points count), `error_px`, `nme`, `loss`, then predicted and true coordinates
        in pixels of the source image."""
        error, valid, norm = self.errors(outputs, targets)
        true = self.source_points(targets["points"].float(), targets).tolist()
        sums, counts = self.losses(outputs, targets, plain=True)
        rows = []
        for i, answer in enumerate(self.answers(outputs, targets)):
            count, total = int(counts[i]), float(error[i].sum())
            row: dict[str, object] = {"valid": count, "error_px": ratio(total, count)}
            row |= {"nme": ratio(total, count * float(norm[i])), "loss": ratio(sums[i], counts[i])}
            shown = [p if v else [None, None] for p, v in zip(true[i], valid[i].tolist(), strict=True)]
            rows.append({**row, **answer, **_columns(self.spec.keypoints, shown, "true_")})
        return rows

    @torch.no_grad()
    def mistake_score(self, outputs: Tensor, targets: Targets) -> Tensor:
        """Mean error of the valid points, in units of half the canvas."""
        valid = targets["valid"].bool()
        error = (self.points(outputs) - targets["points"].float()).norm(dim=2) / self._frame(outputs)[1]
        return torch.where(valid, error, 0.0).sum(1) / valid.sum(1).clamp(min=1)

    def figures(self, meter: Meter) -> dict[str, Figure]:
        if not meter.state():
            return {}
        errors = {name.split("/", 1)[1]: value for name, value in meter.details().items()}
        label = "mean error (pixels of the source image)"
        return {"error_per_keypoint": drawing.bars(errors, "Error per keypoint", label)}

    @torch.no_grad()
    def draw(
        self,
        images: Tensor,
        outputs: Tensor | None,
        targets: Targets,
        names: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> Figure:
        pictures = drawing.unnormalize(images, mean, std)
        predicted = None if outputs is None else self.points(outputs).cpu().numpy()
        true = targets["points"].float().cpu().numpy() if "points" in targets else None
        captions = list(names)
        if true is None:
            valid = torch.ones(len(images), len(self.spec.keypoints), dtype=torch.bool)
        else:
            valid = targets["valid"].bool().cpu()
            if outputs is not None:
                error, seen, _ = self.errors(outputs, targets)
                mean_error = (error.sum(1) / seen.sum(1)).tolist()
                captions = [f"{name}\n{e:.1f} px" for name, e in zip(names, mean_error, strict=True)]
        return overlays.point_grid(pictures, captions, true, predicted, valid.numpy(), self.spec.skeleton)


def object_sizes(true: Tensor, valid: Tensor, box_size: Tensor | None) -> tuple[Tensor, Tensor]:
    """The size of each object (N,) in source pixels, and whether it is known (N,) bool.

    It is the root of the area of the annotated box, or of the box around the valid true points where there is none.
    The shorter side counts as half of the longer one at least: points on a line have no area, but a size.

    Args:
        true: (N, K, 2). valid: (N, K) bool. box_size: (N, 2) width and height of the annotated boxes, 0 where there
            is none; None: there are none at all.
    """
    shown = valid[..., None]
    sides = true.masked_fill(~shown, -math.inf).amax(1) - true.masked_fill(~shown, math.inf).amin(1)
    known = valid.sum(1) >= 2
    if box_size is not None:
        annotated = (box_size > 0).all(1)
        sides = torch.where(annotated[:, None], box_size.to(sides.dtype), sides)
        known = known | (annotated & valid.any(1))
    longer, shorter = sides.amax(1).clamp(min=0), sides.amin(1)
    return (longer * torch.maximum(shorter, longer / 2)).sqrt(), known


def _named_pair(value: str | Sequence[str], names: Sequence[str]) -> tuple[int, int] | None:
    """Indices of the pair of points that normalizes errors; None for the box."""
    if value == "box":
        return None
    if isinstance(value, str) or len(value) != 2 or value[0] == value[1]:
        raise UserError(f"task.normalize_by: must be box or a pair of keypoints [a, b], got {value!r}")
    for name in value:
        if name not in names:
            raise UserError(f"task.normalize_by: {name!r} is no keypoint{suggest(str(name), list(names))}")
    return list(names).index(value[0]), list(names).index(value[1])


def _columns(
    names: Sequence[str], points: Sequence[Sequence[float | None]], prefix: str = ""
) -> dict[str, object]:
    pairs = zip(names, points, strict=True)
    return {
        f"{prefix}{name}_{axis}": value
        for name, point in pairs
        for axis, value in zip("xy", point, strict=True)
    }
