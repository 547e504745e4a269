"""Networks and optimizers with one wiring fault each."""

import torch
from broken import Sound
from torch import Tensor, nn
from torch.nn import functional


class InAList(Sound):
    """A block in a plain Python list."""

    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__(in_channels, num_outputs)
        self.blocks = [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]

    def features(self, images: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(images))))
        for block in self.blocks:
            x = block(x)
        return functional.adaptive_max_pool2d(x, 2).flatten(1)


class ParameterInADict(Sound):
    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__(in_channels, num_outputs)
        self.extras = {"scale": torch.ones(1, requires_grad=True)}

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.extras["scale"]


class RepeatedBlock(nn.Module):
    """`[block] * 3`: one block under three names."""

    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__()
        block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.layers = nn.Sequential(nn.Conv2d(in_channels, 16, 3, padding=1), nn.ReLU(), *[block] * 3)
        self.head = nn.Linear(16 * 4, num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(functional.adaptive_max_pool2d(self.layers(images), 2).flatten(1))


class BorrowedStorage(Sound):
    """A third convolution that shares the storage of the second one's weights."""

    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__(in_channels, num_outputs)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.third = nn.Conv2d(16, 32, 3, padding=1)
        self.extra = nn.Conv2d(16, 16, 3, padding=1)
        self.extra.weight.data = self.second.weight.data

    def features(self, images: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(images))))
        return functional.adaptive_max_pool2d(torch.relu(self.third(torch.relu(self.extra(x)))), 2).flatten(1)


class NeverCalled(Sound):
    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__(in_channels, num_outputs)
        self.forgotten = nn.Conv2d(32, 32, 3, padding=1)


class NoGrad(Sound):
    def features(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return super().features(images)


class AllDetached(Sound):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).detach()


class DeadBiases(Sound):
    """Biases so low that all ReLUs of the second layer are always zero."""

    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__(in_channels, num_outputs)
        nn.init.constant_(self.second.bias, -10.0)


class MixesBatch(Sound):
    """Centers the features over dimension 0, the images."""

    def features(self, images: Tensor) -> Tensor:
        x = super().features(images)
        return x - x.mean(dim=0)


class WrongReshape(Sound):
    """Flattens with a reshape that mixes the images."""

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(images))))
        x = functional.adaptive_max_pool2d(x, 2).movedim(1, 0)  # (N,C,2,2) -> (C,N,2,2)
        return self.head(x.reshape(images.shape[0], -1))


class Squeezes(Sound):
    """Removes the batch dimension of a single image."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).squeeze(0)


class PlaceMatters(Sound):
    """Adds the position in the batch, which has no gradient."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + torch.arange(len(images), device=images.device)[:, None]


class BatchStatisticsInEval(Sound):
    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__(in_channels, num_outputs)
        self.norm = nn.BatchNorm1d(32 * 4, track_running_stats=False)

    def features(self, images: Tensor) -> Tensor:
        return self.norm(super().features(images))


class LogSoftmaxInside(Sound):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).log_softmax(dim=1)


class SigmoidInside(Sound):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).sigmoid()


class TanhInside(Sound):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).tanh()


class HiddenSoftmax(Sound):
    """A softmax of elementary operations, whose name is not in the graph."""

    def forward(self, images: Tensor) -> Tensor:
        powers = super().forward(images).exp()
        return powers / powers.sum(dim=1, keepdim=True)


class ReluOutput(Sound):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).relu()


class AbsOutput(Sound):
    """Positive outputs by an operation that is not in the tables."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).abs()


class DropoutInEval(Sound):
    def features(self, images: Tensor) -> Tensor:
        return functional.dropout(super().features(images), 0.5)


class LayerInForward(Sound):
    """Creates a new layer with new weights in every forward pass."""

    def features(self, images: Tensor) -> Tensor:
        x = super().features(images)
        return nn.Linear(x.shape[1], x.shape[1], device=x.device)(x)


class Normed(Sound):
    """Sound with a batch norm and a dropout."""

    def __init__(self, in_channels: int, num_outputs: int, momentum: float = 0.1, dropout: float = 0.3) -> None:
        super().__init__(in_channels, num_outputs)
        self.norm = nn.BatchNorm2d(16, momentum=momentum)
        self.dropout = nn.Dropout(dropout)

    def features(self, images: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.norm(self.first(images)))))
        return self.dropout(functional.adaptive_max_pool2d(x, 2).flatten(1))


class EvalWhenTraining(Normed):
    """train() has no effect on the norm."""

    def train(self, mode: bool = True) -> "EvalWhenTraining":
        super().train(mode)
        self.norm.eval()
        return self


class TrainsInForward(Normed):
    def forward(self, images: Tensor) -> Tensor:
        self.norm.train()
        return super().forward(images)


class LearnsInEval(Normed):
    """Functional batch norm that always uses batch statistics."""

    def features(self, images: Tensor) -> Tensor:
        norm = self.norm
        x = functional.batch_norm(
            self.first(images), norm.running_mean, norm.running_var, norm.weight, norm.bias, training=True
        )
        return functional.adaptive_max_pool2d(torch.relu(self.second(torch.relu(x))), 2).flatten(1)


class OtherInTraining(Sound):
    """Halves the outputs in training mode."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (0.5 if self.training else 1.0)


class _WrongBackward(torch.autograd.Function):
    """The derivative of a square lacks the factor 2."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x


class WrongBackward(Sound):
    def features(self, images: Tensor) -> Tensor:
        x = _WrongBackward.apply(torch.relu(self.first(images)))
        return functional.adaptive_max_pool2d(torch.relu(self.second(x)), 2).flatten(1)


class Forgetful(torch.optim.SGD):
    """An optimizer that drops the first tensor of its first group."""

    def __init__(self, params, **options) -> None:
        groups = [dict(group) for group in params]
        groups[0]["params"] = groups[0]["params"][1:]
        super().__init__(groups, **options)


class Stuck(torch.optim.SGD):
    """An optimizer whose step does not change the last group."""

    def step(self, closure=None):
        kept = [p.detach().clone() for p in self.param_groups[-1]["params"]]
        super().step(closure)
        with torch.no_grad():
            for parameter, old in zip(self.param_groups[-1]["params"], kept, strict=True):
                parameter.copy_(old)


class Float32Alone(Sound):
    """Sound: accepts only float32 images."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.to(torch.float32))


class PooledOutputs(Sound):
    """Sound: ends like SqueezeNet in a ReLU and a mean over the positions."""

    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__(in_channels, num_outputs)
        self.head = nn.Conv2d(32, num_outputs, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.head(torch.relu(self.second(torch.relu(self.first(images)))))
        return x.relu().mean(dim=(2, 3), keepdim=True).squeeze(3).flatten(1)
