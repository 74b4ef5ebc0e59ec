"""Saving that never leaves half a file: everything is written beside the target, then renamed into place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

WEIGHTS_PATTERN = "model*.safetensors*"  # a file of weights, its shards and their index
CONFIG = "config.json"  # without which nothing loads
PARTIAL = ".partial"


def check_writable(directory: str) -> None:
    """Make the folder if there is none, and try to write into it.

    Raises:
        ValueError: if it cannot be written.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(f"output_dir={directory!r} cannot be written ({error}): choose another folder.") from error


def replace_files(directory: Path, write: Callable[[Path], None], owned: str = WEIGHTS_PATTERN) -> None:
    """Fill `directory` with what `write` puts into the empty folder that it is handed.

    A new directory appears whole or not at all. In one that exists, each file is replaced whole, one right after the
    other, `owned` files of an earlier save that the new one does not have are removed, and other files (checkpoints of
    the run) stay. If `write` raises, or the disk is full, `directory` is as it was. config.json goes first and comes
    last: a process that ends between two renames leaves a folder that `from_pretrained` does not load, not one that
    mixes two saves; the files that it had yet to move lie in it under `.NAME.*.partial`.

    Args:
        owned: a pattern of names: of all files that such a save writes, or any other form of the same.

    Raises:
        OSError: if the folder, or the parent of a new one, cannot be written.
    """
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    is_new = not directory.exists()
    # inside of one that exists: it may be a mount, or its parent not ours to write
    place = directory.parent if is_new else directory
    prefix = f".{directory.name}."
    partial = Path(tempfile.mkdtemp(prefix=prefix, suffix=PARTIAL, dir=place))
    try:
        write(partial)
        if is_new:
            _copy_mode(directory.parent, partial)
            partial.rename(directory)
            return
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _move_all(partial, directory, owned)
    for left in directory.glob(f"{prefix}*{PARTIAL}"):  # this one, and those of processes that were killed
        shutil.rmtree(left, ignore_errors=True)


def _move_all(partial: Path, directory: Path, owned: str) -> None:
    """What is in `partial` into its place; what was not moved, if this is cut short, stays there."""
    written = {path.name for path in partial.iterdir()}
    if CONFIG in written:
        (directory / CONFIG).unlink(missing_ok=True)
    for name in sorted(written - {CONFIG}):
        _move(partial / name, directory / name)
    for stale in directory.glob(owned):
        if stale.name not in written:
            stale.unlink()
    if CONFIG in written:
        _move(partial / CONFIG, directory / CONFIG)


def _move(source: Path, target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    os.replace(source, target)


def _copy_mode(source: Path, target: Path) -> None:
    """`mkdtemp` makes private folders; a saved model is as readable as the folder that it lies in."""
    target.chmod(source.stat().st_mode & 0o777)


def replace_text(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename it: whoever reads finds the old file or the new one, whole.

    Bytes that were read with `errors="surrogateescape"` go back as they were.

    Raises:
        OSError: if the folder cannot be written; `path` is as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
