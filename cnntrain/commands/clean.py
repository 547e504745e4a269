"""Remove what cnntrain keeps for runs to come: decoded images and what scans remember. Downloads and runs stay.

`cnntrain clean` tells what it removed; the next run decodes and scans again.
"""

import shutil

from cnntrain.config.invocation import Invocation
from cnntrain.data.files import default_root
from cnntrain.errors import MachineError, UserError

KEPT = ("decoded", "scans")


def run(invocation: Invocation) -> int:
    if invocation.words or invocation.overrides:
        raise UserError("clean: takes no words and no overrides")
    for name in KEPT:
        folder = default_root() / name
        files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
        size = sum(path.stat().st_size for path in files)
        try:
            if folder.is_dir():
                shutil.rmtree(folder)
        except OSError as error:
            raise MachineError(f"clean: {folder} can't be removed: {error}") from error
        print(
            f"{folder}: {len(files)} files, {size / 2**20:.1f} MiB removed" if files else f"{folder}: nothing"
        )
    return 0
