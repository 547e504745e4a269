"""What a traced run leaves behind: the modules that ran, and the operations that computed something."""

from dataclasses import dataclass, field

from torch import nn

from cnntrain.summary.axes import Axes
from cnntrain.summary.conv_arithmetic import Geometry, Shape


@dataclass
class Operation:
    """One call of a torch operation that computed something from the image.

    inputs: indices of the operations that made its inputs; -1 is the image. parameters: by name, those it
    read.
    in_place: it wrote into its input. call: the layer that it belongs to, or else the innermost module.
    """

    index: int
    name: str
    inputs: tuple[int, ...]
    input_shapes: tuple[Shape, ...]
    output_shape: Shape
    geometry: Geometry | None
    multiply_adds: int | None
    parameters: tuple[str, ...]
    in_place: bool
    call: "Call"
    axes: Axes | None = None


@dataclass
class Call:
    """One run of a module.

    layer: it is shown as one row, whatever happens inside. run: 1, and more where a module is used again.
    same_storage: its output is its input, or was written into it.
    """

    name: str
    module: nn.Module
    layer: bool
    run: int
    input_shapes: tuple[Shape, ...]
    output_shapes: tuple[Shape, ...] = ()
    operations: list[Operation] = field(default_factory=list)
    same_storage: bool = False
    axes: Axes | None = None
