"""Delete cached images and scan results. Downloads and run folders are kept.

`cnntrain clean` prints what it deleted; the next run decodes and scans again.
"""

import shutil

from cnntrain.config.command_line import Invocation
from cnntrain.data.files import cache_folder
from cnntrain.errors import MachineError, UserError

CACHES = ("decoded", "scans")


def run(invocation: Invocation) -> int:
    if invocation.words or invocation.overrides:
        raise UserError("clean: takes no words and no overrides")
    for name in CACHES:
        folder = cache_folder() / name
        files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
        size = sum(path.stat().st_size for path in files)
        try:
            if folder.is_dir():
                shutil.rmtree(folder)
        except OSError as error:
            raise MachineError(f"clean: {folder} cannot be deleted: {error}") from error
        print(f"{folder}: {len(files)} files, {size / 2**20:.1f} MiB deleted" if files else f"{folder}: empty")
    return 0
