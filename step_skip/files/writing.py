"""Write files so that a killed run, a full disk or an untrusted folder does no harm.

`replacing` gives a file its name only when it is complete and on the disk; `locked` keeps a folder to one
writer at a time; `check_folder` checks permissions and free space before a run.
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
# Temporary names; earlier versions put the writer's process id in place of the 16 hex digits.
LEFTOVER = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}([0-9a-f]{{16}}|\d+)_.+")
LOCK_FILE = ".lock"


# --- writing ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield the name of a temporary file beside `path`; rename it to `path` on success, remove it on failure.

    Without `overwrite` the rename fails if the path exists by then: of two writers only one succeeds.

    The content is on the disk before the rename, and the rename before this returns: a reader never sees a
    partial file, not even after a power cut. The temporary name keeps the suffix, by which imageio chooses
    the format.

    The folder may be untrusted and hold symbolic links: the temporary name is random, the file is created
    anew in the folder that was opened, and exactly this file is renamed.

    Raises:
        TakenError: the path exists and may not be replaced.
        DiskError: the disk's error, with `path`.
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
    """Link a complete file to its final name as well; FileExistsError if that name exists."""
    try:
        os.link(name, final, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:  # the file system has no hard links: an empty file reserves the name until the rename
        os.close(os.open(final, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666, dir_fd=folder))


def check_free(*paths: Path) -> None:
    """Check that none of the paths exists, not even as a dangling link.

    Raises:
        TakenError: one exists; the message names the first.
    """
    for path in paths:
        if os.path.lexists(path):
            raise TakenError(
                f"{path} exists and is not replaced by default; choose another name, or overwrite it"
            )


def _sync_file(name: str, folder: int) -> None:
    """Wait until a file's content is on the disk; OSError if its name is no regular file any more."""
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EEXIST, "another program replaced the file while it was written")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: int) -> None:
    """Wait until a folder's entries are on the disk, if its file system supports that."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def folder_inside(directory: Path, *names: str) -> Path:
    """Return the folder directory/name/name/... inside a prior; it need not exist.

    Raises:
        InputError: a part of it is a symbolic link, by which files would be written outside the prior.
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
        # Text that is not UTF-8, in a path for example, becomes an escape of JSON such as \udcff.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_folder(folder: Path, needed: int) -> None:
    """Check that files can be written to a folder; leaves no file behind and creates no folder.

    Args:
        folder: the output folder; it need not exist.
        needed: bytes that will be written.

    Raises:
        InputError: no file can be created there, or less space is free.
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
            f"{there} has {free / 2**20:.0f} MiB free, expected at least {needed / 2**20:.0f} MiB; "
            "free some space or write to another disk"
        )


# --- one writer a folder ------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Lock a folder against a second writer; the lock ends with the process. Readers are not locked out.

    Removes the temporary files that a killed writer left.

    Raises:
        InputError: another process holds the lock, or the folder can't be written.
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
        with contextlib.suppress(OSError):  # the block may have failed because of the disk
            path.unlink()


def _take(descriptor: int) -> bool:
    """Lock an open file; return False if another process holds the lock or has deleted the file."""
    if sys.platform == "win32":  # has no flock
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        log.warning(
            "locks don't work on this file system: make sure that no other process writes to this folder"
        )
    return os.fstat(descriptor).st_nlink > 0
