from collections.abc import Callable
from pathlib import Path

import pytest

from cnntrain.cli import parse_arguments
from cnntrain.sweep.plan import SweepPlan, read_plan

QUICK = ("epochs=1", "data.limit=60", "batch_size=16", "threads=1", "log.figures=false", "log.tensorboard=false")


@pytest.fixture
def plan() -> Callable[..., SweepPlan]:
    """Return a function that reads the command line of a sweep."""

    def read(*arguments: str, ranked: bool = True) -> SweepPlan:
        return read_plan(parse_arguments(["-m", *QUICK, *arguments]), ranked)

    return read


@pytest.fixture
def nets(own_folder: Path) -> Path:
    """Return a folder for `--config-dir` with a network that can raise or kill its process."""
    folder = own_folder / "mine"
    (folder / "model").mkdir(parents=True)
    (folder / "badnets.py").write_text(
        "import os, signal\n"
        "import torch\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_outputs, image_size, fault):\n"
        "        super().__init__()\n"
        "        self.fault, self.fc = fault, nn.Linear(image_size[0] * image_size[1], num_outputs)\n"
        "    def forward(self, x):\n"
        "        if x.device.type == 'cpu' and type(x) is torch.Tensor:\n"
        "            if self.fault == 'raises':\n"
        "                raise IndexError('an error in user code')\n"
        "            if self.fault == 'dies':\n"
        "                os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return self.fc(x.flatten(1))\n"
    )
    (folder / "model" / "faulty.yaml").write_text("_target_: badnets.Net\nfault: no\n")
    return folder
