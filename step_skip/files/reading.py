"""Read files from untrusted sources: regular files of a bounded size, with their SHA-256.

`opened` opens such a file, `read_file` reads it, `sha256_file` and `check_sha256` compute and compare its
checksum.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from step_skip.errors import InputError

# --- reading ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path: Path, *, most: int | None = None, follow: bool = False) -> Iterator[BinaryIO]:
    """Open a file from an untrusted source: a regular file of at most `most` bytes.

    The checks run on the open descriptor, so the file that is checked is the file that is read. Opening
    never blocks on a pipe or a device.

    Args:
        most: largest size in bytes; None: any size.
        follow: follow a symbolic link.

    Raises:
        InputError: the path is not a regular file, too large, or can't be read.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise InputError(
                f"{path} is a symbolic link; a prior holds its own files: copy the file there"
            ) from error
        if error.errno in (errno.ENOENT, errno.ENXIO):  # no such file, or a socket
            raise InputError(f"{path} is missing; copy the prior again or make it again") from error
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(
                f"{path} is missing, the path is not a regular file; copy the prior again or make it again"
            )
        if most is not None and status.st_size > most:
            raise InputError(
                f"{path} is too large: {status.st_size} bytes, expected at most {most}; make the prior again"
            )
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            yield file
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    finally:
        os.close(descriptor)


def read_file(path: Path, *, most: int) -> bytes:
    """Return the bytes of a file from an untrusted source; see `opened`."""
    with opened(path, most=most) as file:
        return file.read(most)


def sha256_file(path: Path, *, most: int | None = None, follow: bool = True) -> str:
    """Return the SHA-256 of a file's bytes, in hex; see `opened`."""
    digest = hashlib.sha256()
    with opened(path, most=most, follow=follow) as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def remembered_sha256(path: Path, *, most: int | None = None) -> str:
    """Return a file's SHA-256 in hex, cached while its size and date stay the same; see `opened`."""
    status = path.stat()
    return _sha256_of_version(path, status.st_size, status.st_mtime_ns, most)


@functools.lru_cache(maxsize=64)
def _sha256_of_version(path: Path, size: int, mtime_ns: int, most: int | None) -> str:
    """Return the SHA-256 of a file; size and date are part of the cache's key."""
    return sha256_file(path, most=most)


def check_sha256(path: Path, found: str, expected: str) -> None:
    """Check that a file's checksum is the recorded one.

    Raises:
        InputError: they differ; the message shows both.
    """
    if found != expected:
        raise InputError(
            f"{path} is damaged: its SHA-256 is {found[:12]}..., expected {expected[:12]}...; "
            "copy the prior again or make it again"
        )


def is_deeper(value: object, levels: int) -> bool:
    """Return whether a value from JSON holds objects or lists nested deeper than so many levels."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_deeper(each, levels - 1) for each in inner)
