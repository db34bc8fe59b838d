"""run_metadata.json: read it, which anybody may have written, and refuse what can't be; write it last of all.

What decides later whether a run may go on is checked here, too: the schedule, value by value, and the record
of the steps so far. No tensor is read and torch isn't imported.

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
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_skip.families import DEFAULT_FAMILY, FAMILIES, Family
from step_skip.files import DTYPES, InputError, RunError, replacing, sha256_file, write_json
from step_skip.prior import METADATA_FILE, Prior, round_sizes, step_files

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
SEAL = "metadata_sha256"  # the entry that vouches for all others
REQUIRED_KEYS = {
    "run_id": str,
    "num_inference_steps": int,
    "scheduler_timesteps": list,
    "scheduler_sigmas": list,
    "denoising_strength": (int, float),
    "sigma_shift": (int, float),
    "height": int,
    "width": int,
    "num_frames": int,
}
# What a version 1 prior records besides; a prior of the pull request's scripts lacks it, and goes unchecked.
VERSION_1_KEYS = {
    "status": str,
    "metadata_sha256": str,
    "files": dict,
    "shapes": dict,
    "model": str,
    "model_fingerprint": dict,
    "prompt": str,
    "negative_prompt": str,
    "cfg_scale": (int, float),
    "start_step": int,
    "fps": (int, float),
    "dtype": str,
    "tiled": bool,
    "seed": int,
    "versions": dict,
}
PROGRESS_KEYS = {
    "stop_after": (int, type(None)),
    "save_decoded_videos": bool,
    "device": str,
    "seconds_per_step": list,
    "forwards_per_step": list,
    "skip_cache": (int, type(None)),
    "tea_cache_l1_thresh": (int, float, type(None)),
    "tea_cache_model_id": str,
    "lora": list,
}
MAX_METADATA_BYTES = 16 * 2**20
MAX_METADATA_DEPTH = 10  # objects in objects; so nothing that walks through them can overflow
MAX_STEPS = 10_000
LIMITS = {  # what can be made and read; far beyond what any machine holds
    "height": (1, 16384),
    "width": (1, 16384),
    "num_frames": (1, 4097),
    "fps": (0.1, 1000),
    "seed": (0, 2**63 - 1),
}
STATUSES = ("running", "stopped", "complete")


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
    _check_keys(metadata, REQUIRED_KEYS)
    if "format_version" not in metadata and SEAL not in metadata:
        metadata = {key: metadata[key] for key in REQUIRED_KEYS}
    elif metadata.get("format_version") == FORMAT_VERSION:
        _check_keys(metadata, VERSION_1_KEYS)
        _check_seal(directory, metadata)
    else:
        raise InputError(
            f"{directory} has format_version {_short(metadata.get('format_version'))}, "
            f"expected {FORMAT_VERSION}; use the version of the program that wrote it"
        )
    _check_sizes(metadata)
    sizes = {key: metadata[key] for key in ("height", "width", "num_frames")}
    metadata |= round_sizes(**sizes, family=_read_family(metadata))  # other writers record what was asked for
    if "format_version" in metadata:
        _check_version_1(metadata)
    return Prior(directory, metadata)


def _read_family(metadata: Mapping[str, Any]) -> Family:
    name = metadata.get("family", DEFAULT_FAMILY)
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(
            f"{METADATA_FILE} has family = {_short(name)}, expected one of {', '.join(FAMILIES)}; use the "
            "version of the program that wrote it"
        )
    return FAMILIES[name]


def _read_metadata(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a folder; a prior is a run_<id> folder of generate_prior.py")
    if not path.is_file():
        raise InputError(
            f"{path.parent} holds no {METADATA_FILE}; a prior is a run_<id> folder of generate_prior.py"
        )
    if path.is_symlink():
        raise InputError(f"{path} is a symbolic link; a prior holds its own files: copy the file there")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_METADATA_BYTES + 1)
        if len(content) > MAX_METADATA_BYTES:
            raise InputError(f"{path} is over {MAX_METADATA_BYTES} bytes, too large for a prior's metadata")
        metadata = json.loads(content.decode("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}); make the prior again") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError, or an integer of thousands of digits
        if isinstance(error, InputError):
            raise
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
    if metadata[SEAL] != sealed(metadata)[SEAL]:
        raise InputError(
            f"{directory / METADATA_FILE} was edited or damaged: its entries are not those it was written "
            "with; copy the prior again or make it again"
        )


# --- one entry at a time ------------------------------------------------------------------------------------


def _check_keys(metadata: Mapping[str, Any], keys: Mapping[str, Any]) -> None:
    for key, kind in keys.items():
        if key not in metadata:
            raise InputError(
                f"{METADATA_FILE} lacks {key!r}; it was not written by generate_prior.py, or was edited"
            )
        value = metadata[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{METADATA_FILE} has {key} = {_short(value)}, expected {_kind_name(kind)}")
        if isinstance(value, str) and not is_utf8(value):
            raise InputError(f"{METADATA_FILE} has {key} = {_short(value)}, expected text that is UTF-8")


def _kind_name(kind: type | tuple[type, ...]) -> str:
    return "a number" if isinstance(kind, tuple) else f"a value of type {kind.__name__}"


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 60 else text[:57] + "..."


def is_utf8(text: str) -> bool:
    """Whether the text can be written as UTF-8: a shell or an escape in JSON may give half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_number(value: object) -> bool:
    """Whether a value from JSON is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 1e30  # false for NaN and infinity, too


def _check_sizes(metadata: Mapping[str, Any]) -> None:
    steps = metadata["num_inference_steps"]
    if not 1 <= steps <= MAX_STEPS:
        raise InputError(
            f"{METADATA_FILE} has num_inference_steps = {_short(steps)}, expected 1 to {MAX_STEPS}"
        )
    for key in ("scheduler_timesteps", "scheduler_sigmas"):
        values = metadata[key]
        if len(values) != steps or not all(is_number(value) for value in values):
            numbers = sum(map(is_number, values))
            raise InputError(
                f"{METADATA_FILE} has {numbers} finite numbers among {len(values)} entries in {key}, "
                f"expected {steps}; make the prior again"
            )
    for key in ("denoising_strength", "sigma_shift", "cfg_scale", "fps"):
        if key in metadata and not (is_number(metadata[key]) and metadata[key] > 0):
            raise InputError(
                f"{METADATA_FILE} has {key} = {_short(metadata[key])}, expected a number above 0"
            )
    if metadata["denoising_strength"] > 1:
        raise InputError(
            f"{METADATA_FILE} has denoising_strength = {metadata['denoising_strength']}, expected at most 1"
        )
    for key, (least, most) in LIMITS.items():
        if key in metadata and not least <= metadata[key] <= most:
            raise InputError(
                f"{METADATA_FILE} has {key} = {_short(metadata[key])}, expected {least} to {most}"
            )


def _check_version_1(metadata: Mapping[str, Any]) -> None:
    if metadata["status"] not in STATUSES:
        raise InputError(
            f"{METADATA_FILE} has status = {_short(metadata['status'])}, expected {' or '.join(STATUSES)}"
        )
    if metadata["dtype"] not in DTYPES:
        raise InputError(
            f"{METADATA_FILE} has dtype = {metadata['dtype']!r}, expected one of {', '.join(DTYPES)}"
        )
    if not 0 <= metadata["start_step"] < metadata["num_inference_steps"]:
        raise InputError(f"{METADATA_FILE} has start_step = {metadata['start_step']}, beyond its own steps")
    for name, digest in metadata["files"].items():
        if Path(name).name != name or name in (".", "..") or "\\" in name:
            raise InputError(
                f"{METADATA_FILE} names the file {_short(name)}, which is not inside the prior; don't use it"
            )
        if not (isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest)):
            raise InputError(
                f"{METADATA_FILE} has {_short(digest)} as the SHA-256 of {name}; make the prior again"
            )
        shape = metadata["shapes"].get(name)
        if name.endswith(".pt") and not _is_shape(shape):
            raise InputError(
                f"{METADATA_FILE} has {_short(shape)} as the shape of {name}; make the prior again"
            )
    needed = {"complete": metadata["num_inference_steps"], "stopped": 1, "running": 0}
    for step in range(needed[metadata["status"]]):
        for name in step_files(step):
            if name not in metadata["files"]:
                raise InputError(f"{METADATA_FILE} lists no {name}; the prior is incomplete: make it again")


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 < size < 2**31 for size in value)


# --- whether a run can go on --------------------------------------------------------------------------------


def check_progress(prior: Prior) -> None:
    """Check what a run that goes on needs of the one before.

    Raises:
        InputError: an older format, which lacks it, or an entry that says something impossible.
    """
    if prior.is_legacy:
        raise InputError("its format is an older one, which records no settings; make it again")
    m = prior.metadata
    _check_keys(m, PROGRESS_KEYS)
    last = m["stop_after"]
    if last is not None and not (type(last) is int and 0 <= last < prior.num_inference_steps):
        raise InputError(f"{METADATA_FILE} has stop_after = {_short(last)}, expected a step; make it again")
    formation = m.get("formation", {})
    if not isinstance(formation, dict):
        raise InputError(f"{METADATA_FILE} has formation = {_short(formation)}; make it again")
    lists = {key: m[key] for key in ("seconds_per_step", "forwards_per_step")}
    if formation.get("branch_distances") is not None:
        lists["branch_distances"] = formation["branch_distances"]
    for key, values in lists.items():
        if not (
            isinstance(values, list) and len(values) >= prior.whole_steps and all(map(is_number, values))
        ):
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
