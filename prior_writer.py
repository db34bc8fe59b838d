"""Write a prior so that no crash, full disk or second writer leaves one that looks whole and is not.

A file is named by the metadata only after it is whole and on the disk (`prior_utils.replacing`), a step only
when its latents and its velocity both are. So whatever stops a run, what the metadata names is whole, and a
run goes on after the last step it names: a new run is one that has no step yet. The metadata's status says

    running     being written, or interrupted
    stopped     by --stop_after: it can be resumed from after each of the steps it has
    complete
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prior_utils import (
    FORMAT_VERSION,
    METADATA_FILE,
    TEMPORARY_PREFIX,
    InputError,
    Prior,
    RunError,
    replacing,
    sealed,
    sha256_file,
    write_json,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if TYPE_CHECKING:
    import torch

LOCK_FILE = ".lock"
LEFTOVER = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}([0-9a-f]{{16}}|\d+)_.+")  # once with the writer's pid


class PriorWriter:
    """Writes a prior file by file, in any order and as often as it takes.

    Args:
        directory: the prior's folder.
        metadata: of a new prior without, of an interrupted one with what it has already.
    """

    def __init__(self, directory: Path, metadata: dict[str, Any]):
        self.directory = directory
        empty = {"format_version": FORMAT_VERSION, "status": "running", "files": {}, "shapes": {}}
        self.metadata = metadata | {key: metadata.get(key, value) for key, value in empty.items()}

    @property
    def prior(self) -> Prior:
        """What is written so far."""
        return Prior(self.directory, self.metadata)

    def write_metadata(self) -> None:
        """Bring the metadata on disk up to date."""
        write_json(self.directory / METADATA_FILE, sealed(self.metadata))

    def save_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Save one tensor as it is (no change of dtype) and record its checksum and shape."""
        import torch

        # By way of memory: on a full disk write_bytes raises OSError, torch.save something of its own.
        content = io.BytesIO()
        torch.save(tensor.detach().cpu().contiguous().clone(), content)
        self.save(name, lambda path: path.write_bytes(content.getbuffer()))
        self.metadata["shapes"][name] = list(tensor.shape)

    def save(self, name: str, write: Callable[[Path], object]) -> None:
        """Let `write(path)` make the file `name`, then record its checksum.

        Raises:
            RunError: the prior had this file, it was lost, and what was made in its place is another.
        """
        with replacing(self.directory / name) as temporary:
            write(temporary)
            digest = sha256_file(temporary)
            if self.metadata["files"].get(name, digest) != digest:
                raise RunError(
                    f"{self.directory / name} came out other than the prior records it, so it was not "
                    "replaced; make the prior again"
                )
        self.metadata["files"][name] = digest

    def record(self, step: int, **values: object) -> None:
        """Keep a value of a step under each name, in a list with one for every step so far."""
        for name, value in values.items():
            self.metadata.setdefault(name, [])[step:] = [value]

    def finish(self, status: str, **metadata: Any) -> None:
        """Add what is known only at the end and declare the prior "complete" or "stopped"."""
        self.metadata |= metadata | {"status": status}
        self.write_metadata()


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
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(descriptor).st_nlink > 0


def check_run_id(output_dir: Path, run_id: str | None) -> None:
    """Refuse a run id that is taken.

    Raises:
        InputError: it is.
    """
    if run_id is not None and (output_dir / f"run_{run_id}").exists():
        raise InputError(
            f"{output_dir / f'run_{run_id}'} exists and is never overwritten; "
            "choose another --run_id, remove it, or finish it with --resume"
        )


def create_run_dir(output_dir: Path, run_id: str | None) -> tuple[Path, str]:
    """Make an empty `run_<id>` below `output_dir`; without an id, one from the clock that is still free.

    Raises:
        InputError: the id is taken, or the folder can't be written.
    """
    check_run_id(output_dir, run_id)
    wanted = run_id or time.strftime("%Y%m%d_%H%M%S")
    candidate, tries = wanted, 1
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        while True:
            directory = output_dir / f"run_{candidate}"
            try:
                directory.mkdir()  # fails where it exists, also when two runs try at once
                return directory, candidate
            except FileExistsError:
                check_run_id(output_dir, run_id)
                tries += 1
                candidate = f"{wanted}_{tries}"
    except OSError as error:
        raise InputError(
            f"cannot write to {output_dir}: {error.strerror}; name a folder that can be written"
        ) from error
