"""Train convolutional networks from YAML, and know whether to trust the result.

From Python: `from cnntrain import compose, train`, then `train(compose("model=mlp", "data=digits", "epochs=5"))`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnntrain.settings import Settings

__all__ = ["compose", "overfit", "train"]


def compose(*overrides: str, config_dir: str | Path | None = None) -> "Settings":
    """The settings that the command line would make of `overrides`.

    Raises:
        UserError: a group, an option, a key or a value is wrong.
    """
    from cnntrain.config import read_settings

    return read_settings(overrides, Path(config_dir) if config_dir else None)


def train(settings: "Settings") -> dict[str, Any]:
    """Train; what results.json holds, and `run_dir`."""
    from cnntrain.commands.train import train as run

    return run(settings)


def overfit(settings: "Settings") -> dict[str, Any]:
    """Learn one example by heart; what overfit.json holds, and `run_dir`."""
    from cnntrain.commands.overfit import overfit as run

    return run(settings)
