"""Files that a killed run, a full disk or a stranger can do no harm with: written whole, read within bounds.

Writing: a file takes its name only when it is whole and on the disk; a folder has one writer.
Reading: a .pt file that anybody may have made holds one tensor, of a known shape, and nothing else. Nothing
in it is run, and no more memory is taken than the tensor needs. Checked on the archive before torch sees it:
stored, not compressed, as large as can be, and a pickle that names only what torch.save names for a tensor.
torch then reads it with weights_only=True. Of a safetensors file the header's size is looked at first.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import pickletools
import re
import secrets
import shutil
import stat
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float16", "float32")
MAX_PICKLE_BYTES = 2**16
MAX_HEADER_BYTES = 2**24  # of a safetensors file; those of a 14B model and of its LoRAs have some 100 KB
# what a pickle of torch.save names for a tensor
TENSOR_GLOBALS = re.compile(r"torch\._utils _rebuild_tensor_v2|collections OrderedDict|torch \w+Storage")
TEMPORARY_PREFIX = ".tmp_"
LEFTOVER = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}([0-9a-f]{{16}}|\d+)_.+")  # once with the writer's pid
LOCK_FILE = ".lock"


class InputError(ValueError):
    """What the user gave cannot be used."""


class RunError(RuntimeError):
    """The input was fine, the run was not (network, memory, non-finite latents)."""


class DiskError(OSError):
    """A file could not be written; says which."""


# --- writing ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`; on success it takes the final name, on failure it is removed.

    The content is on the disk before the name is, and the name before this returns: a reader never sees
    half a file, not even after a power cut. The temporary name keeps the suffix, by which imageio chooses
    the format.

    The folder may be a stranger's, with links laid in the way: the temporary name can't be guessed, is made
    anew in the folder that was opened, and what takes the final name is the file that was made.

    Raises:
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
        os.replace(name, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        _sync_folder(folder)
    except OSError as error:
        raise DiskError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=folder)
        os.close(folder)


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


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write `data` as readable JSON, whole or not at all."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:  # what is no UTF-8, in a path for example, becomes JSON's own \udcff
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def sha256_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's contiguous bytes in its own dtype, in hex."""
    import torch

    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


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


# --- a tensor that anybody may have made --------------------------------------------------------------------


def load_tensor(path: Path, *, shape: tuple[int, ...], dtype: str | None = None) -> torch.Tensor:
    """Load the one tensor a .pt file holds; nothing else in the file is ever unpickled.

    Args:
        shape: expected shape; also bounds what is read into memory.
        dtype: expected dtype, "bfloat16" for example; None: any of DTYPES.

    Raises:
        InputError: not a tensor, wrong shape or dtype, NaN or infinite values, or a pickle with code in it.
    """
    stored = _check_archive(path, largest=math.prod(shape) * 4)
    tensor = _unpickle(path)
    _check_tensor(tensor, path, shape=shape, stored=stored, dtypes=DTYPES if dtype is None else (dtype,))
    return tensor


def _unpickle(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError ... for bad files
        raise InputError(
            f"{path} is not a tensor file ({_first_line(error)}); nothing in it was run; make the prior again"
        ) from error


def _check_tensor(
    tensor: Any, path: Path, *, shape: tuple[int, ...], stored: int, dtypes: tuple[str, ...]
) -> None:
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise InputError(
            f"{path} holds a {type(tensor).__name__}, expected a tensor with its data; make the prior again"
        )
    if tuple(tensor.shape) != shape:
        raise InputError(
            f"{path} has shape {list(tensor.shape)}, expected {list(shape)}; make the prior again"
        )
    dtype = dtype_name(tensor)
    if dtype not in dtypes:
        raise InputError(f"{path} has dtype {dtype}, expected {' or '.join(dtypes)}; make the prior again")
    if tensor.untyped_storage().nbytes() > stored:  # torch would read on behind the end
        raise InputError(f"{path} claims more values than it holds; make the prior again")
    if not tensor.is_contiguous():
        raise InputError(
            f"{path} holds a tensor that is not contiguous, as no prior does; make the prior again"
        )
    if not torch.isfinite(tensor).all():
        raise InputError(f"{path} holds NaN or infinite values; make the prior again")


def dtype_name(tensor: torch.Tensor) -> str:
    """A tensor's dtype as the command line and the metadata say it: "bfloat16", for example."""
    return str(tensor.dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"


def _check_archive(path: Path, *, largest: int) -> int:
    """Refuse what torch.save never writes for a tensor; returns how many bytes of values are stored."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise InputError(f"{path} is a compressed archive, which no prior holds; don't use it")
            size = sum(entry.file_size for entry in entries)
            if size > largest + 2**20:
                raise InputError(f"{path} holds {size} bytes, expected at most {largest}; don't use it")
            _check_pickle(_read_pickle(archive), path)
    except InputError:
        raise
    except Exception as error:  # zipfile raises BadZipFile, struct.error, ValueError ... for bad files
        raise InputError(
            f"{path} is not a tensor file ({_first_line(error)}); it was cut off or is something else: "
            "copy the prior again or make it again"
        ) from error
    return max((entry.file_size for entry in entries if re.search(r"/data/\d+$", entry.filename)), default=0)


def _read_pickle(archive: zipfile.ZipFile) -> bytes:
    [entry] = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
    if entry.file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"a pickle of {entry.file_size} bytes")
    return archive.read(entry)


def _check_pickle(content: bytes, path: Path) -> None:
    """Refuse a pickle that would call anything but what makes a tensor."""
    for opcode, argument, _ in pickletools.genops(content):
        named = opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL")
        if named and not TENSOR_GLOBALS.fullmatch(str(argument)):
            raise InputError(
                f"{path} holds {str(argument)[:60]!r}, expected a tensor; nothing in it was run, don't use it"
            )


# --- safetensors files --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of its tensors, by key, and of itself."""

    shapes: Mapping[str, Sequence[int]]
    dtypes: Mapping[str, str]  # "BF16", for example
    metadata: Mapping[str, str]


def read_header(path: Path, *, what: str) -> Header:
    """Read a safetensors file's header. safetensors checks that the tensors fill the file, without gaps.

    Raises:
        InputError: no such file; `what` says which was wanted.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{what} {path} is not a file; name a .safetensors file")
    try:
        with path.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")  # as the format begins
        if size > MAX_HEADER_BYTES:
            raise SafetensorError(f"a header of {size} bytes")
        with safe_open(path, framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return Header(
                {key: each.get_shape() for key, each in slices.items()},
                {key: each.get_dtype() for key, each in slices.items()},
                file.metadata() or {},
            )
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{what} {path} is not a safetensors file that can be read ({str(error)[:80]}); "
            "fetch it again, or convert it"
        ) from error
