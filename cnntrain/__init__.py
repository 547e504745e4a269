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
    """Train; return what results.json holds, and `run_dir`.

    The process keeps its own settings: torch's flags, threads and random state, warning filters and Hydra's state are
    what they were before the call.

    Args:
        settings: what `compose` returns.

    Raises:
        TypeError: `settings` is something else.
        CnntrainError: the command's failures, by kind: see `cnntrain.errors`.
    """
    _check_settings(settings, "train")
    from cnntrain.commands.train import train as run
    from cnntrain.engine.device import preserve_process_settings

    with preserve_process_settings():
        return run(settings)


def overfit(settings: "Settings") -> dict[str, Any]:
    """Learn one fixed example, as `cnntrain overfit` does; return what overfit.json holds, and `run_dir`.

    Arguments, errors and the process's settings are as with `train`.
    """
    _check_settings(settings, "overfit")
    from cnntrain.commands.overfit import overfit as run
    from cnntrain.engine.device import preserve_process_settings

    with preserve_process_settings():
        return run(settings)


def _check_settings(settings: object, name: str) -> None:
    from cnntrain.settings import Settings

    if not isinstance(settings, Settings):
        raise TypeError(
            f"{name}() takes the settings that compose() returns, as {name}(compose('model=mlp', 'epochs=5')); "
            f"got {type(settings).__name__}"
        )
