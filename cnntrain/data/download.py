"""Fetching torchvision's data sets, and saying what to do where that fails."""

import logging
from pathlib import Path
from typing import Any

from cnntrain.errors import UserError

logger = logging.getLogger("cnntrain")


def download(name: str, root: Path, looked_in: str, allowed: bool = True, **arguments: Any) -> Any:
    """torchvision's data set `name` under `root`, downloaded where it isn't there.

    Args:
        looked_in: where the files were looked for, for the message.
        allowed: whether a download is allowed; False if only a checkpoint names the data set.
        arguments: further ones of the data set's class.

    Raises:
        UserError: no network, a full or read-only disk, a corrupt download, or a download that is not allowed.
    """
    import torchvision.datasets

    try:
        if allowed:
            logger.info("data: downloading %s to %s", name, root)
            root.mkdir(parents=True, exist_ok=True)
        return getattr(torchvision.datasets, name)(str(root), download=allowed, **arguments)
    except (OSError, RuntimeError, EOFError, ValueError) as error:  # URLError is an OSError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not allowed:
            raise UserError(
                f"data: {name} was not found, and a checkpoint cannot start a download ({reason})\n"
                f"  looked in {looked_in}\n"
                f"  give data.root=PATH, a folder that contains it or that it should be downloaded to"
            ) from error
        raise UserError(
            f"data: {name} is not there and could not be downloaded ({reason})\n"
            f"  looked in {looked_in}\n"
            f"  point to the folder that has it with data.root=PATH; data=digits needs no download"
        ) from error
