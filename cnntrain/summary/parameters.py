"""Whose parameters are whose: each is counted once, where it is used first; and what folding leaves."""

from collections.abc import Iterable

from torch import nn

from cnntrain.summary.trace import Trace

_NORM_OPERATIONS = ("native_batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_with_update")


class Owner:
    """Gives every parameter and statistic to the first row that uses it."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())
        self.modules = dict(model.named_modules())
        self.left = {id(p): name for name, p in self.parameters.items()}
        self.buffers = {id(b) for b in model.buffers() if b.is_floating_point()}

    def take(self, names: Iterable[str]) -> tuple[int, int]:
        """Return the number of parameters and of trainable parameters."""
        return self._take(self.parameters[name] for name in names)

    def take_module(self, module: nn.Module) -> tuple[tuple[int, int], int]:
        """Return (parameters, trainable parameters) and the number of running statistics."""
        taken = self._take(module.parameters())
        statistics = [b for b in module.buffers() if id(b) in self.buffers]
        self.buffers -= {id(b) for b in statistics}
        return taken, sum(b.numel() for b in statistics)

    def _take(self, parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
        taken = [p for p in parameters if self.left.pop(id(p), None)]
        return sum(p.numel() for p in taken), sum(p.numel() for p in taken if p.requires_grad)

    def rest(self) -> list[tuple[str, tuple[int, int], int]]:
        """Return (module, (parameters, trainable), statistics) of unused modules, for example auxiliary heads."""
        homes = dict.fromkeys(name.rpartition(".")[0] for name in self.left.values())
        found = []
        for home in homes:
            count = self.take([name for name in self.left.values() if name.rpartition(".")[0] == home])
            own = self.modules[home].buffers(recurse=False)
            found.append((home, count, sum(b.numel() for b in own if id(b) in self.buffers)))
        return found


def folds(trace: Trace) -> dict[int, int]:
    """By operation, how many parameters folding BatchNorm adds (a bias for the convolution) or removes (its
    own).

    A norm folds into the convolution or dense layer right before it, when nothing else reads that one's
    output.
    """
    readers: dict[int, int] = {}
    for operation in trace.operations:
        for i in operation.inputs:
            readers[i] = readers.get(i, 0) + 1
    change: dict[int, int] = {}
    for operation in trace.operations:
        module = operation.call.module
        if operation.name not in _NORM_OPERATIONS or not isinstance(module, nn.modules.batchnorm._NormBase):
            continue
        before = (
            trace.operations[operation.inputs[0]] if operation.inputs and operation.inputs[0] >= 0 else None
        )
        if before is None or before.name not in ("convolution", "addmm", "mm") or readers[before.index] != 1:
            continue
        if module.running_mean is None or operation.call.run > 1 or before.call.run > 1:
            continue
        change[operation.index] = -sum(p.numel() for p in module.parameters())
        has_bias = getattr(before.call.module, "bias", None) is not None if before.call.layer else False
        change[before.index] = 0 if has_bias else module.num_features
    return change
