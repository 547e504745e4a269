"""Train convolutional networks from YAML, and know whether to trust the result.

From Python: `from cnntrain import compose, train`, then `train(compose("model=mlp", "data=digits", "epochs=5"))`.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnntrain.config.schema import Settings

__all__ = ["compose", "overfit", "train"]

# Import the package `cnntrain.train` before the function of that name is defined. A later first import would replace
# the function, because importing a submodule sets it as an attribute of its parent.
importlib.import_module("cnntrain.train")


def compose(*overrides: str, config_dir: str | Path | None = None) -> "Settings":
    """Return the settings for command-line overrides; raise `UserError` if one is invalid."""
    from cnntrain.config.compose import read_settings

    return read_settings(overrides, Path(config_dir) if config_dir else None)


def train(settings: "Settings") -> dict[str, Any]:
    """Train a network and return the content of results.json plus `run_dir`.

    Process-wide settings are restored after the call: torch's flags, threads and random state, warning filters and
    Hydra's state.

    Args:
        settings: the return value of `compose`.

    Raises:
        TypeError: `settings` has another type.
        CnntrainError: one of the subclasses in `cnntrain.errors`.
    """
    return _run("cnntrain.commands.train", "train", settings)


def overfit(settings: "Settings") -> dict[str, Any]:
    """Overfit one fixed example, like `cnntrain overfit`; return the content of overfit.json plus `run_dir`.

    Arguments, errors and the handling of process-wide settings are the same as for `train`.
    """
    return _run("cnntrain.checks.overfit", "overfit", settings)


def _run(module: str, name: str, settings: object) -> dict[str, Any]:
    from cnntrain.config.schema import Settings

    if not isinstance(settings, Settings):
        raise TypeError(
            f"{name}() takes the settings that compose() returns, as {name}(compose('model=mlp', 'epochs=5')); "
            f"got {type(settings).__name__}"
        )
    from cnntrain.train.device import preserve_process_settings

    with preserve_process_settings():
        return getattr(importlib.import_module(module), name)(settings)
