"""Keypoint localization: K named points per image by regression or heatmaps, evaluated in pixels of the source file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cnntrain.errors import UserError, suggest
from cnntrain.plots.charts import plot_bars
from cnntrain.plots.images import plot_keypoints, unnormalize
from cnntrain.tasks import heatmaps
from cnntrain.tasks.meter import Meter, ratio
from cnntrain.tasks.task import Targets, Task, check_choice, check_number
from cnntrain.transfer import constant, to_device, wide_dtype
from cnntrain.types import DataSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PCK_THRESHOLDS = (0.05, 0.1)  # relative to the object size
LEARNED_ERROR = 0.02  # in half image sides
MIN_OBJECT_SIZE = 0.05  # fraction of the longer image side
REGRESSION_LOSSES = ("mse", "l1", "smooth_l1", "wing")


class Keypoints(Task):
    """K named points per image. Points that are not valid (unlabeled, or outside the image) are excluded everywhere.

    Targets: `points` (N, K, 2) image pixels (x, y) and `valid` (N, K) bool; optionally `source_to_image` (N, 3, 3), the
    matrix from pixels of the source file to image pixels, for metrics in source pixels, and `box_size` (N, 2), width
    and height of annotated boxes in source pixels.

    Outputs: with `head='regression'` (N, 2K), x and y of each point relative to the image center in units of half the
    longer side, so that a flip changes the sign. With `head='heatmap'` maps (N, K, h, w) that cover the image with
    aligned corners.

    Args:
        spec: metadata of the dataset; its size must be that of the images that the model gets.
        head: 'regression' or 'heatmap'.
        loss: 'auto', 'mse', 'l1', 'smooth_l1' or 'wing'. For regression, 'auto' is wing. For heatmaps, 'auto' is the
            Kullback-Leibler divergence of the softmax over cells from a Gaussian, and 'mse' the mean squared difference
            from a Gaussian with maximum 1 (Tompson et al. 2014); there are no others.
        smooth_l1_beta, wing_width, wing_curvature: constants of these losses, in half image sides.
        heatmap_sigma: standard deviation of the Gaussian in cells.
        normalize_by: size by which NME and PCK divide errors: 'box' (see `object_sizes`), or the distance of two named
            points, for example the outer eye corners. At least 1/20 of the longer image side, so that no single object
            dominates the mean.
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
        self.head = check_choice("task.head", head, ("regression", "heatmap"))
        choices = ("auto", *REGRESSION_LOSSES) if head == "regression" else ("auto", "mse")
        self.loss_name = check_choice(f"task.loss (with task.head={head})", loss, choices)
        if head == "regression" and loss == "auto":
            self.loss_name = "wing"
        self.smooth_l1_beta = check_number("task.smooth_l1_beta", smooth_l1_beta, 0.0, exclude_low=True)
        self.wing_width = check_number("task.wing_width", wing_width, 0.0, exclude_low=True)
        self.wing_curvature = check_number("task.wing_curvature", wing_curvature, 0.0, exclude_low=True)
        self.heatmap_sigma = check_number("task.heatmap_sigma", heatmap_sigma, 0.0, exclude_low=True)
        self._size_pair = _parse_normalize_by(normalize_by, spec.keypoints)
        self.num_outputs = len(spec.keypoints) * (2 if head == "regression" else 1)
        self.monitor = ("nme", "min")
        self.monitor_range = (0.0, math.inf)

    def normalize_points(self, points: Tensor) -> Tensor:
        """Convert image pixels (..., 2) to units of half the longer side, relative to the center."""
        center, half_side = self._center_and_half_side(points)
        return (points - center) / half_side

    def _center_and_half_side(self, like: Tensor) -> tuple[Tensor, float]:
        height, width = self.spec.image_size
        center = constant(((width - 1) / 2, (height - 1) / 2), like.device, like.dtype)
        return center, max(height - 1, width - 1, 1) / 2

    def points(self, outputs: Tensor) -> Tensor:
        """Return predicted points (N, K, 2) float32 in image pixels (x, y)."""
        outputs = outputs.float()
        if self.head == "regression":
            coordinates = outputs.reshape(len(outputs), len(self.spec.keypoints), 2)  # (N, 2K) -> (N, K, 2)
            center, half_side = self._center_and_half_side(coordinates)
            return coordinates * half_side + center
        log_heat = outputs if self.loss_name == "auto" else outputs.clamp(min=1e-6).log()
        map_size = (outputs.shape[-2], outputs.shape[-1])
        return heatmaps.cells_to_pixels(heatmaps.decode(log_heat), self.spec.image_size, map_size)

    def losses(self, outputs: Tensor, targets: Targets, training: bool = True) -> tuple[Tensor, Tensor]:
        true, valid = valid_points(targets)
        if self.head == "regression":
            coordinates = outputs.float().reshape(true.shape)  # (N, 2K) -> (N, K, 2)
            error = torch.where(valid[..., None], coordinates - self.normalize_points(true), 0.0)
            per_point = self._regression_losses(error).mean(2)
        else:
            per_point = torch.where(valid, self._heatmap_losses(outputs.float(), true), 0.0)
        return per_point.sum(1), valid.sum(1).float()

    def _regression_losses(self, error: Tensor) -> Tensor:
        """Return the loss of coordinate errors, elementwise.

        'smooth_l1' is quadratic within `smooth_l1_beta` and linear beyond (Girshick, Fast R-CNN, 2015, equation 3).
        'wing' is logarithmic within `wing_width` and linear beyond (Feng et al., Wing Loss, CVPR 2018, equation 5); it
        has gradients up to wing_width / wing_curvature times those of L1 for small errors.
        """
        if self.loss_name == "mse":
            return error.square()
        size = error.abs()
        if self.loss_name == "smooth_l1":
            beta = self.smooth_l1_beta
            return torch.where(size < beta, 0.5 * size.square() / beta, size - 0.5 * beta)
        if self.loss_name == "wing":
            width, curvature = self.wing_width, self.wing_curvature
            offset = width - width * math.log1p(width / curvature)
            return torch.where(size < width, width * torch.log1p(size / curvature), size - offset)
        return size

    def _heatmap_losses(self, outputs: Tensor, true: Tensor) -> Tensor:
        """Return (N, K) losses from maps (N, K, h, w) and points in image pixels."""
        map_size = (outputs.shape[-2], outputs.shape[-1])
        cells = heatmaps.pixels_to_cells(true, self.spec.image_size, map_size)
        log_target = heatmaps.log_gaussian(cells, map_size, self.heatmap_sigma)
        if self.loss_name == "mse":
            return (outputs - log_target.exp()).square().mean((2, 3))
        log_target = log_target.flatten(2).log_softmax(2)
        return (log_target.exp() * (log_target - outputs.flatten(2).log_softmax(2))).sum(2)

    def memorized_loss(self, uninformed: float) -> float:
        """For regression, return the loss of an error of 1 % of the longer image side.

        A fraction of the uninformed loss would depend on the loss function.
        """
        if self.head == "heatmap":
            return super().memorized_loss(uninformed)
        return float(self._regression_losses(torch.tensor(LEARNED_ERROR)))

    def output_shape(self) -> tuple[int | None, ...]:
        return (self.num_outputs, None, None) if self.head == "heatmap" else (self.num_outputs,)

    def prepare(self, targets: Targets) -> None:
        if "valid" in targets and not targets["valid"].any():
            raise UserError("data: no training image has a point that is labeled and inside the image")

    def source_points(self, points: Tensor, targets: Targets) -> Tensor:
        """Convert image pixels (N, K, 2) to pixels of the source files, in float64 where available."""
        points = points.to(wide_dtype(points.device))
        matrix = targets.get("source_to_image")
        return points if matrix is None else image_to_source(points, matrix)

    def errors(self, outputs: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """Return errors in source pixels (N, K), validity of the points (N, K) bool, and object sizes (N,).

        The size is 0 if it is unknown: fewer than two valid points and no annotated box, or a point of the pair in
        `normalize_by` is not valid.
        """
        true, valid = valid_points(targets)
        # Convert true and predicted points together: the matrix is inverted once.
        source = self.source_points(torch.cat([true, self.points(outputs)], 1), targets)
        true, predicted = source.split(true.shape[1], dim=1)
        error = (predicted - true).norm(dim=2)
        if self._size_pair:
            a, b = self._size_pair
            size, known = (true[:, a] - true[:, b]).norm(dim=1), valid[:, a] & valid[:, b]
        else:
            size, known = object_sizes(true, valid, targets.get("box_size"))
        min_size = MIN_OBJECT_SIZE * max(self.spec.image_size)
        matrix = targets.get("source_to_image")
        if matrix is not None:
            min_size = min_size * source_pixels_per_image_pixel(matrix, size.device, size.dtype)
        size = torch.where(known, size.clamp(min=min_size), 0.0)
        return torch.where(valid, error, 0.0), valid, size

    def meter(self) -> KeypointMeter:
        return KeypointMeter(self)

    @torch.no_grad()
    def predictions(self, outputs: Tensor, targets: Targets) -> list[dict[str, object]]:
        """Return `<name>_x` and `<name>_y` of every point in pixels of the source file."""
        points = self.source_points(self.points(outputs), targets).tolist()
        return [_point_columns(self.spec.keypoints, row) for row in points]

    @torch.no_grad()
    def per_example(self, outputs: Tensor, targets: Targets) -> list[dict[str, object]]:
        """Return `valid` (number of valid points), `error_px`, `nme`, `loss`, and predicted and true coordinates.

        Coordinates are in pixels of the source file.
        """
        error, valid, size = self.errors(outputs, targets)
        true = self.source_points(targets["points"].float(), targets).tolist()
        sums, counts = self.losses(outputs, targets, training=False)
        rows = []
        for i, prediction in enumerate(self.predictions(outputs, targets)):
            count, total = int(counts[i]), float(error[i].sum())
            row: dict[str, object] = {"valid": count, "error_px": ratio(total, count)}
            row |= {"nme": ratio(total, count * float(size[i])), "loss": ratio(sums[i], counts[i])}
            labeled = [p if v else [None, None] for p, v in zip(true[i], valid[i].tolist(), strict=True)]
            rows.append({**row, **prediction, **_point_columns(self.spec.keypoints, labeled, "true_")})
        return rows

    @torch.no_grad()
    def mistake_score(self, outputs: Tensor, targets: Targets) -> Tensor:
        """Return the mean error of the valid points in half image sides."""
        valid = targets["valid"].bool()
        half_side = self._center_and_half_side(outputs)[1]
        error = (self.points(outputs) - targets["points"].float()).norm(dim=2) / half_side
        return torch.where(valid, error, 0.0).sum(1) / valid.sum(1).clamp(min=1)

    def figures(self, meter: Meter) -> dict[str, Figure]:
        if not meter.state():
            return {}
        errors = {name.split("/", 1)[1]: value for name, value in meter.details().items()}
        return {"error_per_keypoint": plot_bars(errors, "Error per keypoint", "mean error (source pixels)")}

    @torch.no_grad()
    def draw(self, images: Tensor, outputs: Tensor | None, targets: Targets, names: Sequence[str]) -> Figure:
        predicted = None if outputs is None else self.points(outputs).cpu().numpy()
        true = targets["points"].float().cpu().numpy() if "points" in targets else None
        captions = list(names)
        if true is None:
            valid = torch.ones(len(images), len(self.spec.keypoints), dtype=torch.bool)
        else:
            valid = targets["valid"].bool().cpu()
            if outputs is not None:
                error, counted, _ = self.errors(outputs, targets)
                for i, (total, count) in enumerate(zip(error.sum(1).tolist(), counted.sum(1).tolist(), strict=True)):
                    if count:
                        captions[i] += f"\n{total / count:.1f} px"
        pictures = unnormalize(images, *self.spec.normalization)
        return plot_keypoints(pictures, captions, true, predicted, valid.numpy(), self.spec.skeleton)


class KeypointMeter(Meter):
    """Loss; over all valid points the mean error in source pixels, NME, and PCK at 0.05 and 0.1.

    NME is the mean error relative to the object size, PCK the fraction of points whose relative error is at most the
    threshold.
    """

    def __init__(self, task: Keypoints) -> None:
        super().__init__()
        self._task = task

    def collect(self, outputs: Tensor, targets: Mapping[str, Tensor]) -> None:
        error, valid, size = self._task.errors(outputs, targets)
        sized = valid & (size > 0)[:, None]
        relative = error / torch.where(size > 0, size, 1.0)[:, None]
        correct = [(sized & (relative <= threshold)).sum() for threshold in PCK_THRESHOLDS]
        totals = torch.stack([torch.where(sized, relative, 0.0).sum(), sized.sum(), *correct])
        # One tensor for all sums: few operations per step.
        self.add("keypoints", torch.cat([error.sum(0), valid.sum(0), totals]))

    def _split(self, values: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """Return the sums: error (K,), valid points (K,), relative error, points with a size, correct points."""
        count = len(self._task.spec.keypoints)
        return values["keypoints"].split([count, count, 1, 1, len(PCK_THRESHOLDS)])

    def compute_metrics(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        error_px, valid, relative, sized, correct = self._split(values)
        metrics = {"nme": ratio(relative, sized), "error_px": ratio(error_px.sum(), valid.sum())}
        pairs = zip(PCK_THRESHOLDS, correct, strict=True)
        return metrics | {f"pck@{threshold}": ratio(count, sized) for threshold, count in pairs}

    def details(self) -> dict[str, float]:
        """Return `error_px/<point>`: the mean error of each point in source pixels."""
        error_px, valid, *_ = self._split(self.read())
        rows = zip(self._task.spec.keypoints, error_px, valid, strict=True)
        return {f"error_px/{name}": ratio(error, count) for name, error, count in rows}


def valid_points(targets: Targets) -> tuple[Tensor, Tensor]:
    """Return true points (N, K, 2) float32, 0 where they are not valid (they may be NaN), and validity (N, K) bool."""
    valid = targets["valid"].bool()
    return torch.where(valid[..., None], targets["points"].float(), 0.0), valid


def image_to_source(points: Tensor, source_to_image: Tensor) -> Tensor:
    """Convert points (N, K, 2) from image pixels to source pixels by the inverses of `source_to_image` (N, 3, 3)."""
    # inv_ex does not check for singular matrices, which would need a host sync.
    matrix = source_to_image.to(wide_dtype(source_to_image.device))
    inverse = to_device(torch.linalg.inv_ex(matrix).inverse, points.device, points.dtype)
    moved = points @ inverse[:, :2, :2].mT + inverse[:, None, :2, 2]
    weight = points @ inverse[:, 2:, :2].mT + inverse[:, None, 2:, 2]  # 1 unless it is a perspective
    return moved / weight


def source_pixels_per_image_pixel(source_to_image: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return (N,) on `device`: the side of an image pixel in source pixels, for `source_to_image` (N, 3, 3)."""
    a, b, c, d = source_to_image[:, :2, :2].flatten(1).unbind(1)
    return to_device((a * d - b * c).abs().rsqrt(), device, dtype)


def object_sizes(true: Tensor, valid: Tensor, box_size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the size of each object (N,) in source pixels, and whether it is known (N,) bool.

    The size is the square root of the area of the annotated box, or of the box around the valid points. The shorter
    side counts as at least half of the longer one, because points on a line have no area.

    Args:
        box_size: (N, 2) width and height of the annotated boxes, 0 for objects without one; None if there are none.
    """
    invalid = ~valid[..., None]
    sides = true.masked_fill(invalid, -math.inf).amax(1) - true.masked_fill(invalid, math.inf).amin(1)
    known = valid.sum(1) >= 2
    if box_size is not None:
        annotated = (box_size > 0).all(1)
        sides = torch.where(annotated[:, None], box_size.to(sides.dtype), sides)
        known = known | (annotated & valid.any(1))
    longer, shorter = sides.amax(1).clamp(min=0), sides.amin(1)
    return (longer * torch.maximum(shorter, longer / 2)).sqrt(), known


def _parse_normalize_by(value: str | Sequence[str], names: Sequence[str]) -> tuple[int, int] | None:
    """Return the indices of the two keypoints whose distance is the object size; None for 'box'."""
    if value == "box":
        return None
    if isinstance(value, str) or len(value) != 2 or value[0] == value[1]:
        raise UserError(f"task.normalize_by: must be box or a pair of keypoints [a, b], got {value!r}")
    for name in value:
        if name not in names:
            hint = suggest(str(name), list(names))
            raise UserError(f"task.normalize_by: {name!r} is not a keypoint{hint}")
    return list(names).index(value[0]), list(names).index(value[1])


def _point_columns(
    names: Sequence[str], points: Sequence[Sequence[float | None]], prefix: str = ""
) -> dict[str, object]:
    """Return `<prefix><name>_x` and `<prefix><name>_y` of each point."""
    return {
        f"{prefix}{name}_{axis}": value
        for name, point in zip(names, points, strict=True)
        for axis, value in zip("xy", point, strict=True)
    }
