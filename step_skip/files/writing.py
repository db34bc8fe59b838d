"""Write files so that a killed run, a full disk or an untrusted folder does no harm.

A file takes its name only when it is complete and on the disk; a folder has one writer at a time.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from step_skip.errors import DiskError, InputError, TakenError

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)
TEMPORARY_PREFIX = ".tmp_"
LEFTOVER = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}([0-9a-f]{{16}}|\d+)_.+")  # once with the writer's pid
LOCK_FILE = ".lock"


# --- writing ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary file beside `path`; on success it takes the final name, on failure it is removed.

    Without `overwrite` it takes only a name that nothing has by then: of two writers only one gets it.

    The content is on the disk before the name is, and the name before this returns: a reader never sees
    half a file, not even after a power cut. The temporary name keeps the suffix, by which imageio chooses
    the format.

    The folder may be a stranger's, with links laid in the way: the temporary name can't be guessed, is made
    anew in the folder that was opened, and what takes the final name is the file that was made.

    Raises:
        TakenError: something has the name, and may not be replaced.
        DiskError: whatever the disk refused, with `path`.
    """
    name = f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}_{path.name[-40:]}"  # at most 255 bytes
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise DiskError(error.errno, error.strerror or str(error), str(path)) from error
    try:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666, dir_fd=folder))
        yield path.with_name(name)
        _sync_file(name, folder)
        if not overwrite:
            _reserve(name, path.name, folder)
        os.replace(name, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        _sync_folder(folder)
    except OSError as error:
        if not overwrite and isinstance(error, FileExistsError):
            check_free(path)
        raise DiskError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=folder)
        os.close(folder)


def _reserve(name: str, final: str, folder: int) -> None:
    """Give a whole file its final name, too, where nothing has it yet; else FileExistsError."""
    try:
        os.link(name, final, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: an empty file has the name for a moment
        os.close(os.open(final, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666, dir_fd=folder))


def check_free(*paths: Path) -> None:
    """Refuse names that something has, a link that leads nowhere included.

    Raises:
        TakenError: with the first of them.
    """
    for path in paths:
        if os.path.lexists(path):
            raise TakenError(
                f"{path} exists and is not replaced unasked; choose another name, or overwrite it"
            )


def _sync_file(name: str, folder: int) -> None:
    """Wait until a file's content is on the disk; a link or anything else under its name is refused."""
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EEXIST, "another program put something in its place while it was written")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: int) -> None:
    """Wait until a folder's list of names is on the disk, where its file system can do that."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def folder_inside(directory: Path, *names: str) -> Path:
    """The folder of these names, one in the other, inside a prior; it need not be there.

    Raises:
        InputError: one of them is a link, which would lead what is written there out of the prior.
    """
    folder = directory
    for name in names:
        folder = folder / name
        if folder.is_symlink():
            raise InputError(
                f"{folder} is a symbolic link, which leads out of the prior; remove it, or name another "
                "folder with --output or --output_dir"
            )
    return folder


def write_json(path: Path, data: Mapping[str, Any], *, overwrite: bool = True) -> None:
    """Write `data` as readable JSON, whole or not at all; see `replacing`."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    with replacing(path, overwrite=overwrite) as temporary:
        # what is no UTF-8, in a path for example, becomes JSON's own \udcff
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_folder(folder: Path, needed: int) -> None:
    """Refuse to start what could not be written there. Nothing is left behind, no folder is made yet.

    Args:
        folder: where files will be written; it may have to be made.
        needed: bytes.

    Raises:
        InputError: no file can be made there, or less space is free.
    """
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {there}: {error.strerror}; name a folder that can be written"
        ) from error
    free = shutil.disk_usage(there).free
    if free < needed:
        raise InputError(
            f"{there} has {free / 2**20:.0f} MiB free, and this needs {needed / 2**20:.0f}; "
            "free some space or write to another disk"
        )


# --- one writer a folder ------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep a second writer out of a folder; ends with the process, however that ends. Readers may read on.

    Clears away what a killed writer left under temporary names.

    Raises:
        InputError: another writer is at it, or the folder can't be written.
    """
    path = directory / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise InputError(f"cannot write to {directory}: {error.strerror}; copy it elsewhere") from error
    try:
        if not _take(descriptor):
            raise InputError(f"another process is writing {directory}; wait until it has ended")
        with _removed_at_the_end(path):
            for leftover in directory.iterdir():
                if LEFTOVER.fullmatch(leftover.name) and (leftover.is_symlink() or leftover.is_file()):
                    leftover.unlink()
            yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _removed_at_the_end(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the disk may be what failed
            path.unlink()


def _take(descriptor: int) -> bool:
    """Lock an open file; False where another process has it, or had it until it was deleted."""
    if sys.platform == "win32":  # has no flock
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        log.warning("locks don't work on this file system: make sure that nothing else writes here")
    return os.fstat(descriptor).st_nlink > 0
