"""run_metadata.json: read it, which anybody may have written, and refuse what can't be; write it last of all.

Its entries are checked once, against schema.py; here, whether a run may go on: the schedule, value by value,
and the record of the steps so far. No tensor is read and torch isn't imported.

No crash, full disk or second writer leaves a prior that looks whole and is not: a file is named by the
metadata only after it is whole and on the disk (`files.replacing`), a step only when its latents and its
velocity both are. So whatever stops a run, what the metadata names is whole, and a run goes on after the last
step it names: a new run is one that has no step yet. The metadata's status says

    running     being written, or interrupted
    stopped     by --stop_after: it can be resumed from after each of the steps it has
    complete
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_skip.files import InputError, RunError, read_file, replacing, sha256_file, write_json
from step_skip.prior import METADATA_FILE, Prior, ranges, round_sizes, step_files
from step_skip.schema import Metadata, Schedule, check_entries, short

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
SEAL = "metadata_sha256"  # the entry that vouches for all others
# what a run that goes on needs of the one before, and the earliest priors of version 1 lack
PROGRESS_KEYS = (
    "stop_after",
    "save_decoded_videos",
    "device",
    "seconds_per_step",
    "forwards_per_step",
    "skip_cache",
    "tea_cache_l1_thresh",
    "tea_cache_model_id",
    "lora",
)
MAX_METADATA_BYTES = 16 * 2**20
MAX_METADATA_DEPTH = 10  # objects in objects; so nothing that walks through them can overflow


def read_prior(directory: Path) -> Prior:
    """Read a prior's metadata and check its form; no tensor is read and torch isn't imported.

    Raises:
        InputError: no prior there, an unfinished one, or metadata that says something impossible.
    """
    prior = read_run(directory)
    if not prior.is_legacy and prior.metadata["status"] == "running":
        raise InputError(
            f"{directory} is unfinished ({prior.whole_steps} of {prior.num_inference_steps} steps are "
            "whole): generate_prior.py was interrupted or is still running; wait for it, or finish the prior "
            f"with generate_prior.py --resume {directory}"
        )
    return prior


def read_run(directory: Path) -> Prior:
    """Like `read_prior`, for whoever goes on with an unfinished one, too."""
    metadata = _read_metadata(directory / METADATA_FILE)
    version: type[Schedule]
    if "format_version" not in metadata and SEAL not in metadata:
        version = Schedule
        metadata = {key: value for key, value in metadata.items() if key in Schedule.model_fields}
    elif metadata.get("format_version") == FORMAT_VERSION:
        version = Metadata
        _check_seal(directory, metadata)
    else:
        raise InputError(
            f"{directory} has format_version {short(metadata.get('format_version'))}, "
            f"expected {FORMAT_VERSION}; use the version of the program that wrote it"
        )
    check_entries(metadata, version)
    sizes = {key: metadata[key] for key in ("height", "width", "num_frames")}
    prior = Prior(directory, metadata)
    metadata |= round_sizes(**sizes, family=prior.family)  # other writers may record what was asked for
    if not prior.is_legacy:
        _check_whole_steps(prior)
    return prior


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        if not path.parent.is_dir():
            raise InputError(
                f"{path.parent} is not a folder; a prior is a run_<id> folder of generate_prior.py"
            )
        is_there = path.is_file()
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise InputError(f"cannot read {path.parent}: {error.strerror}; name a prior") from error
    if not is_there:
        raise InputError(
            f"{path.parent} holds no {METADATA_FILE}; a prior is a run_<id> folder of generate_prior.py"
        )
    content = read_file(path, most=MAX_METADATA_BYTES)
    try:
        metadata = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}); make the prior again") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError, or an integer of thousands of digits
        raise InputError(
            f"{path} is not valid JSON ({error}); it was cut off or edited: make the prior again"
        ) from error
    if not isinstance(metadata, dict):
        raise InputError(
            f"{path} holds a {type(metadata).__name__}, expected a JSON object; make the prior again"
        )
    if _is_deeper(metadata, MAX_METADATA_DEPTH):
        raise InputError(f"{path} is nested deeper than {MAX_METADATA_DEPTH} levels; make the prior again")
    return metadata


def _is_deeper(value: object, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(each, levels - 1) for each in inner)


def sealed(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with its own SHA-256, over all other entries, whatever their order and layout."""
    entries = {key: value for key, value in metadata.items() if key != SEAL}
    text = json.dumps(entries, sort_keys=True)
    return entries | {SEAL: hashlib.sha256(text.encode()).hexdigest()}


def _check_seal(directory: Path, metadata: Mapping[str, Any]) -> None:
    if metadata.get(SEAL) != sealed(metadata)[SEAL]:
        raise InputError(
            f"{directory / METADATA_FILE} was edited or damaged: its entries are not those it was written "
            "with; copy the prior again or make it again"
        )


def _check_whole_steps(prior: Prior) -> None:
    """Refuse a prior whose status promises more steps than it lists files of."""
    m = prior.metadata
    needed = {"complete": m["num_inference_steps"], "stopped": 1, "running": 0}
    steps = range(needed[m["status"]]) if prior.kept_steps is None else ()  # a pruned one: see make_plan
    for step in steps:
        for name in step_files(step):
            if name not in m["files"]:
                raise InputError(f"{METADATA_FILE} lists no {name}; the prior is incomplete: make it again")


# --- whether a run can go on --------------------------------------------------------------------------------


def check_progress(prior: Prior) -> None:
    """Check what a run that goes on needs of the one before.

    Raises:
        InputError: an older format, which lacks it, or an entry that says something impossible.
    """
    if prior.is_legacy:
        raise InputError("its format is an older one, which records no settings; make it again")
    m = prior.metadata
    if prior.kept_steps is not None:
        raise InputError(f"it keeps only steps {ranges(prior.kept_steps)}; make it again")
    for key in PROGRESS_KEYS:
        if key not in m:
            raise InputError(f"{METADATA_FILE} lacks {key!r}; it is older, or was edited: make it again")
    lists = {key: m[key] for key in ("seconds_per_step", "forwards_per_step")}
    if (distances := m.get("formation", {}).get("branch_distances")) is not None:
        lists["branch_distances"] = distances
    for key, values in lists.items():
        if len(values) < prior.whole_steps:
            raise InputError(f"{METADATA_FILE} has no number for each step in {key}; make it again")


def check_distinct(timesteps: list[float]) -> None:
    """Refuse a schedule in which two steps share a timestep: the scheduler finds its place by timestep.

    Raises:
        InputError: naming the steps.
    """
    for step, (now, after) in enumerate(zip(timesteps, timesteps[1:], strict=False)):
        if not after < now:
            raise InputError(
                f"steps {step} and {step + 1} of this schedule are both at timestep {now:.6g}; "
                "use a --sigma_shift nearer to 5 or a smaller --num_inference_steps"
            )


def check_schedule(prior: Prior, *, timesteps: Iterable[float], sigmas: Iterable[float]) -> None:
    """Compare every timestep and sigma the installed scheduler computes with those the prior recorded.

    Args:
        timesteps: of the full schedule, num_inference_steps values in 0 ... 1000.
        sigmas: likewise, in 0 ... 1; DiffSynth leaves out the closing 0.

    Raises:
        InputError: they differ, so the latents are not at the noise level the scheduler would assume.
    """
    for key, computed in (("scheduler_timesteps", timesteps), ("scheduler_sigmas", sigmas)):
        recorded, computed = prior.metadata[key], list(computed)
        if len(recorded) != len(computed):
            raise InputError(
                f"{key}: the prior has {len(recorded)} entries, the installed scheduler {len(computed)}"
            )
        for step, (old, new) in enumerate(zip(recorded, computed, strict=True)):
            if not math.isclose(old, new, rel_tol=1e-6, abs_tol=1e-9):
                raise InputError(
                    f"{key}[{step}]: the prior has {old:.6f}, the installed scheduler gives {new:.6f}; "
                    f"use diffsynth {prior.metadata.get('versions', {}).get('diffsynth', 'as it was then')} "
                    "or make the prior again"
                )


# --- writing ------------------------------------------------------------------------------------------------


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
