"""What a data set is to the rest of cnntrain: facts, and its examples."""

import os
from abc import ABC, abstractmethod
from pathlib import Path

from cnntrain.data.examples import Examples
from cnntrain.errors import UserError
from cnntrain.types import DataSpec


class Source(ABC):
    """A kind of data set; one class per kind, one YAML file per data set.

    Attributes:
        downloads: whether missing files may be downloaded to its folder.
    """

    downloads = True

    @abstractmethod
    def spec(self) -> DataSpec:
        """The facts. Cheap: may list folders and read tables, decodes no image.

        Raises:
            UserError: the data are not there, or not as they should be.
        """

    @abstractmethod
    def load(self) -> dict[str, Examples]:
        """The examples by split: 'train' always, 'val' and 'test' where the data set has them.

        Raises:
            UserError: as for `spec`, all faulty files in one message.
        """


def default_root() -> Path:
    """Where downloads go when `data.root` is null: `~/.cache/cnntrain`, or `$XDG_CACHE_HOME/cnntrain`."""
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "cnntrain"
    try:
        return Path.home() / ".cache" / "cnntrain"
    except RuntimeError as error:  # no HOME, and the user id has no entry in passwd, as in some containers
        raise UserError(
            "no home folder for downloads and caches (HOME is not set and the user has no passwd entry); set HOME or "
            "XDG_CACHE_HOME to a folder, or give data.root"
        ) from error


def given_folder(root: str | None, needed: str) -> Path:
    """`data.root` as a folder that exists.

    Args:
        needed: what must be in it, for the message.

    Raises:
        UserError: none was given, or it is not there.
    """
    if root is None:
        raise UserError(f"data.root: missing; give the folder that has {needed}, as data.root=PATH")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise UserError(f"data.root: {folder.absolute()} {what}; it must have {needed}")
    return folder
