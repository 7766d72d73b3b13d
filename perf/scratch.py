"""Where runs write, and what becomes of it: emptied and put away after each run, removed when all are over.

Removing a run's thousands of files would be part of the next run's figures: for minutes, ext4 looks at every
inode that was freed before it gives one out, up to a millisecond a file, whoever makes it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

SUFFIX = ".done"


def put_away(directory: Path) -> None:
    """Free the bytes of all files below `directory`, keep the files, and make way for the next run."""
    if not directory.exists():
        return
    for parent, _, names in os.walk(directory):
        for name in names:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                os.truncate(path, 0)
    done = directory.with_name(directory.name + SUFFIX)
    done.mkdir(exist_ok=True)
    directory.rename(done / str(len(os.listdir(done))))


def remove_all(directory: Path) -> None:
    """Remove `directory` and all that was put away of it."""
    for path in (directory, directory.with_name(directory.name + SUFFIX)):
        shutil.rmtree(path, ignore_errors=True)
