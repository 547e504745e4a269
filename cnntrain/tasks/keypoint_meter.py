"""Metrics of keypoints: errors in source pixels, NME and PCK, exact over all valid points."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cnntrain.tasks.meter import Meter, ratio

THRESHOLDS = (0.05, 0.1)  # of PCK: the share of points whose error is at most this, relative to the norm


class KeypointMeter(Meter):
    """Loss; over all valid points: mean error in source pixels, NME, and PCK at 0.05 and 0.1.

    Args:
        names: of the K points.
        errors: of outputs and targets, as `Keypoints.errors` gives them.
    """

    def __init__(self, names: Sequence[str], errors: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__()
        self._names, self._errors = names, errors

    def _collect(self, outputs: Tensor, targets: Mapping[str, Tensor]) -> None:
        error, valid, norm = self._errors(outputs, targets)
        normed = valid & (norm > 0)[:, None]
        share = error / torch.where(norm > 0, norm, 1.0)[:, None]
        correct = [(normed & (share <= limit)).sum() for limit in THRESHOLDS]
        totals = torch.stack([torch.where(normed, share, 0.0).sum(), normed.sum(), *correct])
        self._add("keypoints", torch.cat([error.sum(0), valid.sum(0), totals]))  # one sum: few operations

    def _split(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts of the one sum, by name."""
        count = len(self._names)
        error_px, valid, nme, normed, correct = values["keypoints"].split(
            [count, count, 1, 1, len(THRESHOLDS)]
        )
        return {"error_px": error_px, "valid": valid, "nme": nme, "normed": normed, "correct": correct}

    def _metrics(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        values = self._split(values)
        metrics = {
            "nme": ratio(values["nme"], values["normed"]),
            "error_px": ratio(values["error_px"].sum(), values["valid"].sum()),
        }
        correct = zip(THRESHOLDS, values["correct"], strict=True)
        return metrics | {f"pck@{limit}": ratio(hits, values["normed"]) for limit, hits in correct}

    def details(self) -> dict[str, float]:
        """`error_px/<point>`: mean error of that point in source pixels."""
        values = self._split(self.read())
        pairs = zip(self._names, values["error_px"], values["valid"], strict=True)
        return {f"error_px/{name}": ratio(error, count) for name, error, count in pairs}
