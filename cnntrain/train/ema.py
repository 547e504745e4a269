"""An exponential moving average of a model's weights (Polyak and Juditsky 1992)."""

import copy

import torch
from torch import Tensor, nn


class MovingAverage:
    """A second copy of the model whose weights follow the first: `average += (1 - decay) * (weights - average)`.

    Buffers (BatchNorm's statistics) are copied. Early on the decay is held to (1 + step) / (10 + step), so that the
    initial weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averages: list[Tensor] = list(self.model.parameters())
        weights: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            copies, buffers = by_dtype.setdefault(mine.dtype, ([], []))
            copies.append(mine)
            buffers.append(theirs)
        for copies, buffers in by_dtype.values():  # one kernel per dtype on CUDA
            torch._foreach_copy_(copies, buffers)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)
