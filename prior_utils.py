"""The prior on disk: write it, read it, verify it, and check that the schedule is still the same.

A prior is a folder `run_<id>/`:

    run_metadata.json        settings, schedule, SHA-256 of every other file, shapes; what it names is whole
    initial_latents.pt       latents before step 0, at sigmas[0]: the noise (plus the video of --input_video)
    step_0000.pt ...         latents *after* step i, that is, at sigmas[i + 1]; the last ones are clean
    noise_pred_0000.pt ...   the velocity of step i after guidance (DiffSynth calls it noise_pred)
    y.pt, clip_feature.pt    what the model sees of the input image
    context_<hash>.pt        one encoded prompt each, named after the text
    input_image.png          the input image as the model saw it
    output_full.mp4          the prior's own video
    formation.png            how it took shape, step by step (formation.py)
    denoised_0000.mp4 ...    with --save_decoded_videos or --stop_after: what step i points at, decoded
    contexts/                prompts that were encoded later (contexts.py); no part of the prior
    outputs/                 the videos infer_from_prior.py makes from it; no part of the prior

Every .pt file holds one tensor in the pipeline's dtype: converting it would break bit-exactness.
Resuming from `start_step` loads `step_<start_step>.pt` and runs steps start_step + 1 ... N - 1.

This module knows files and schedules; it imports neither a pipeline nor the command line.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import DiskError, InputError, RunError  # noqa: F401, the last for those who import it from here
from tensor_file import DTYPES, load_tensor

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
SEAL = "metadata_sha256"  # the entry that vouches for all others
METADATA_FILE = "run_metadata.json"
TEMPORARY_PREFIX = ".tmp_"
INITIAL_LATENTS_FILE = "initial_latents.pt"
IMAGE_FILE = "input_image.png"
OUTPUT_FILE = "output_full.mp4"
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
DENSER = 1.7  # how much denser to the end the steps of a differential resume are; 1: evenly spread
LATE = 0.5  # share of the schedule after which a resumed run rarely changes the motion
LATENT_CHANNELS = 16  # z_dim of the Wan2.1 VAE
SPATIAL_FACTOR = 8  # pixels per latent, height and width
TEMPORAL_FACTOR = 4  # frames per latent, after the first
STATUSES = ("running", "stopped", "complete")
SAME_SIGMA = 1e-6  # relative; sigmas are float32 and come by way of text


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What fixes the schedule, the shape and the cost of a run; the names are WanVideoPipeline's.

    cfg_scale: one for all steps, or a tuple with one for each step that runs.
    skip_cache: ours; one step in so many runs all blocks (skip_cache.py), None: all do.
    """

    num_inference_steps: int
    denoising_strength: float
    sigma_shift: float
    cfg_scale: float | tuple[float, ...]
    height: int
    width: int
    num_frames: int
    tiled: bool = True
    seed: int | None = None
    skip_cache: int | None = None
    tea_cache_l1_thresh: float | None = None
    tea_cache_model_id: str = ""

    @property
    def pipeline_inputs(self) -> dict[str, Any]:
        """The settings that WanVideoPipeline takes."""
        return {name: value for name, value in vars(self).items() if name != "skip_cache"}


class Clock:
    """Adds up the seconds of a run by phase."""

    def __init__(self):
        self.seconds = dict.fromkeys(("load", "encode", "denoise", "decode", "save"), 0.0)
        self.mark = time.perf_counter()

    def add(self, phase: str) -> float:
        """Count the time since the last call as `phase`, and return it."""
        now = time.perf_counter()
        elapsed, self.mark = now - self.mark, now
        self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed
        return elapsed

    def include(self, seconds: Mapping[str, float]) -> None:
        """Take over what another clock counted since the last call."""
        for phase, elapsed in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed
        self.mark = time.perf_counter()


@dataclass(frozen=True)
class Prior:
    """A prior's folder and its metadata, checked for form by `read_prior`."""

    directory: Path
    metadata: Mapping[str, Any]

    @property
    def num_inference_steps(self) -> int:
        return self.metadata["num_inference_steps"]

    @property
    def is_legacy(self) -> bool:
        """True for a prior of the pull request's scripts: latents and schedule, nothing else."""
        return "format_version" not in self.metadata

    @property
    def is_complete(self) -> bool:
        """False for a prior that was stopped early (--stop_after) or interrupted."""
        return self.is_legacy or self.metadata["status"] == "complete"

    @property
    def whole_steps(self) -> int:
        """How many steps are recorded, from the first one on, each with latents and velocity."""
        if self.is_legacy:
            return self.num_inference_steps
        return leading_steps(self.metadata["files"], self.num_inference_steps)

    @property
    def settings(self) -> RunSettings:
        """The settings of the run that made it."""
        names = {field.name for field in fields(RunSettings)}
        return RunSettings(**{name: value for name, value in self.metadata.items() if name in names})

    @property
    def latents_shape(self) -> tuple[int, ...]:
        """[B, C, T, H, W] of the latents."""
        m = self.metadata
        return latents_shape(height=m["height"], width=m["width"], num_frames=m["num_frames"])

    def has(self, name: str) -> bool:
        """Whether the prior records a file of this name."""
        return name in self.metadata.get("files", {})


# --- names and shapes ---------------------------------------------------------------------------------------


def step_file(step: int) -> str:
    """Name of the latents after `step`."""
    return f"step_{step:04d}.pt"


def noise_pred_file(step: int) -> str:
    """Name of the guided velocity of `step`."""
    return f"noise_pred_{step:04d}.pt"


def step_files(step: int) -> tuple[str, str]:
    """What there is of a step that is whole."""
    return step_file(step), noise_pred_file(step)


def leading_steps(names: Iterable[str], num_inference_steps: int) -> int:
    """How many steps, from the first one on, have all their files among these."""
    names = set(names)
    lacking = (step for step in range(num_inference_steps) if not names.issuperset(step_files(step)))
    return next(lacking, num_inference_steps)


def denoised_file(step: int) -> str:
    """Name of the video of what `step` points at."""
    return f"denoised_{step:04d}.mp4"


def latents_before_file(step: int) -> str:
    """Name of the latents `step` starts from."""
    return INITIAL_LATENTS_FILE if step == 0 else step_file(step - 1)


def context_file(text: str) -> str:
    """Name of an encoded prompt: the same text has the same name in every prior."""
    return f"context_{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt"


def latents_shape(*, height: int, width: int, num_frames: int) -> tuple[int, ...]:
    """[B, C, T, H, W] of the Wan2.1 latents of a video of this size (pixels, frames)."""
    frames = (num_frames - 1) // TEMPORAL_FACTOR + 1
    return (1, LATENT_CHANNELS, frames, height // SPATIAL_FACTOR, width // SPATIAL_FACTOR)


def round_sizes(*, height: int, width: int, num_frames: int) -> dict[str, int]:
    """The sizes WanVideoPipeline rounds these to, up and silently (`check_resize_height_width`)."""
    pixels = 2 * SPATIAL_FACTOR  # the DiT's patches are 2 x 2 latents
    return {
        "height": math.ceil(height / pixels) * pixels,
        "width": math.ceil(width / pixels) * pixels,
        "num_frames": math.ceil((num_frames - 1) / TEMPORAL_FACTOR) * TEMPORAL_FACTOR + 1,
    }


def recommended_start_step(num_inference_steps: int) -> int:
    """The step to resume from unless told otherwise: 6 of 10, and the same share of other schedules."""
    return min(num_inference_steps * 6 // 10, num_inference_steps - 1)


def is_late(start_step: int, num_inference_steps: int) -> bool:
    """Whether a run resumed after this step rarely shows a new motion; after the last it reads no prompt."""
    return LATE * num_inference_steps <= start_step < num_inference_steps - 1


def recommended_num_steps(num_inference_steps: int) -> int:
    """How many steps a differential resume runs by default: 3 of 10, and that share of others, 2 of 4."""
    return max(1 if num_inference_steps < 4 else 2, round(0.3 * num_inference_steps))


def spread_steps(num_inference_steps: int, num_steps: int) -> list[int]:
    """The steps of a differential resume: 0 5 8 for 3 of 10, and the same places of other schedules.

    They are denser to the end, where sigma falls fast: step i of n is 1 - (1 - i / n) ** DENSER of the way.
    Where only one or two run the first is a tenth of the way, on the prior's path. Both are what came nearest
    to the full run on the embedded model (benchmarks/results/promise/summary.md).
    """
    first = num_inference_steps // 10 if num_steps <= 2 else 0
    parts = (1 - (1 - i / num_steps) ** DENSER for i in range(num_steps))
    steps = (max(first, round(part * num_inference_steps)) for part in parts)
    room = range(num_inference_steps - num_steps, num_inference_steps)  # for those that follow
    return [min(max(i, step), last) for i, (step, last) in enumerate(zip(steps, room, strict=True))]


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


# --- reading ------------------------------------------------------------------------------------------------


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
    metadata |= round_sizes(**sizes)  # other writers may record what was asked for
    if "format_version" in metadata:
        _check_version_1(metadata)
    return Prior(directory, metadata)


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


def is_utf8(text: str) -> bool:
    """Whether the text can be written as UTF-8: a shell or an escape in JSON may give half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 60 else text[:57] + "..."


def _check_seal(directory: Path, metadata: Mapping[str, Any]) -> None:
    if metadata[SEAL] != sealed(metadata)[SEAL]:
        raise InputError(
            f"{directory / METADATA_FILE} was edited or damaged: its entries are not those it was written "
            "with; copy the prior again or make it again"
        )


def sealed(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with its own SHA-256, over all other entries, whatever their order and layout."""
    entries = {key: value for key, value in metadata.items() if key != SEAL}
    text = json.dumps(entries, sort_keys=True)
    return entries | {SEAL: hashlib.sha256(text.encode()).hexdigest()}


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


def is_number(value: object) -> bool:
    """Whether a value from JSON is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 1e30  # false for NaN and infinity, too


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


def check_files(prior: Prior, names: Iterable[str]) -> dict[str, str]:
    """Compare files with their recorded SHA-256, and return it by name. A legacy prior recorded none.

    Raises:
        InputError: a file is missing, unreadable, leads out of the prior, or is not what was written.
    """
    digests = {}
    for name in names:
        path = prior.directory / name
        if path.is_symlink():
            raise InputError(f"{path} is a symbolic link; a prior holds its own files: copy the file there")
        if not path.is_file():
            raise InputError(f"{path} is missing; copy the prior again or make it again")
        if not prior.is_legacy and not prior.has(name):
            raise InputError(f"{METADATA_FILE} lists no {name}; the prior is incomplete: make it again")
        try:
            size, most = path.stat().st_size, largest_file(prior, name)
            if size > most:
                raise InputError(f"{path} has {size} bytes, expected at most {most}; make the prior again")
            digests[name] = found = sha256_file(path)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        expected = found if prior.is_legacy else prior.metadata["files"][name]
        if found != expected:
            raise InputError(
                f"{path} is damaged: its SHA-256 is {found[:12]}..., expected {expected[:12]}...; "
                "copy the prior again or make it again"
            )
    return digests


def largest_file(prior: Prior, name: str) -> int:
    """A safe upper bound of a file's bytes, so that no time or memory goes into what can't be right."""
    m = prior.metadata
    if name.endswith(".pt"):  # a context of Wan2.1 has 8 MiB
        return 2 * 4 * math.prod(prior.latents_shape) + 2**26
    return m["height"] * m["width"] * 3 * (m["num_frames"] + 1) + 2**22


def damaged_files(prior: Prior) -> dict[str, str]:
    """What is wrong with the files the prior records, by name; see `check_files`."""
    problems = {}
    for name in prior.metadata["files"]:
        try:
            check_files(prior, [name])
        except InputError as error:
            problems[name] = str(error)
    return problems


def load_latents(prior: Prior, name: str) -> torch.Tensor:
    """Load latents or a velocity, [B, C, T, H, W] in the prior's dtype, on the CPU.

    Raises:
        InputError: not a tensor, wrong shape or dtype, NaN or infinite values, or a pickle with code in it.
    """
    dtype = prior.metadata.get("dtype")
    return load_tensor(prior.directory / name, shape=prior.latents_shape, dtype=dtype)


def load_denoised(prior: Prior, step: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The clean latents a step points at, latents - sigma * noise_pred: [B, C, T, H, W], on the CPU.

    Args:
        dtype: to compute in; None: the prior's.

    Raises:
        InputError: see `load_latents`.
    """
    latents, noise_pred = (
        load_latents(prior, name).to(dtype=dtype)
        for name in (latents_before_file(step), noise_pred_file(step))
    )
    return latents - prior.metadata["scheduler_sigmas"][step] * noise_pred


def load_conditioning(prior: Prior, name: str) -> torch.Tensor:
    """Load y, clip_feature or a context, in the prior's dtype and recorded shape, on the CPU.

    Raises:
        InputError: see `load_latents`.
    """
    m = prior.metadata
    return load_tensor(prior.directory / name, shape=tuple(m["shapes"][name]), dtype=m["dtype"])


# --- what a prior was made with -----------------------------------------------------------------------------


def check_fingerprint(prior: Prior, found: Mapping[str, str]) -> None:
    """Compare the weights, by component, with those the prior was made with.

    A prior made without Skip-Cache records no skip_branch: it used none, so any will do.

    Raises:
        InputError: they differ.
    """
    for component, digest in () if prior.is_legacy else found.items():
        recorded = prior.metadata["model_fingerprint"].get(component)
        if recorded != digest and (component, recorded) != ("skip_branch", None):
            raise InputError(
                f"the {component} weights are not those the prior was made with (fingerprint {digest[:12]}, "
                f"expected {str(recorded)[:12]}); name the right ones with --model_dir or make the prior "
                "again"
            )


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


# --- the schedule -------------------------------------------------------------------------------------------


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


def tail_sigmas(sigma: float, num_steps: int, *, sigma_shift: float) -> list[float]:
    """Sigmas of so many steps from `sigma` to 0, spaced as FlowMatchScheduler("Wan") spaces a full run."""
    even = sigma / (sigma_shift - (sigma_shift - 1) * sigma)  # what the shift makes sigma of
    places = [even * (1 - i / num_steps) for i in range(num_steps)]
    return [sigma, *(sigma_shift * s / (1 + (sigma_shift - 1) * s) for s in places[1:])]


def place_on_path(sigma: float, sigmas: Sequence[float]) -> tuple[int, float]:
    """The step in which a run passes `sigma`, and how far into it: 0 where it begins, below 1.

    Args:
        sigmas: the run's, decreasing, without the closing 0.

    Raises:
        ValueError: the run begins below it, or it isn't above 0.
    """
    if not 0 < sigma <= sigmas[0] * (1 + SAME_SIGMA):
        raise ValueError(f"{sigma:g} is not between 0 and {sigmas[0]:.6g}")
    step = max(i for i, begin in enumerate(sigmas) if sigma <= begin * (1 + SAME_SIGMA))
    begin, end = sigmas[step], [*sigmas, 0.0][step + 1]
    return step, 0.0 if sigma >= begin * (1 - SAME_SIGMA) else (begin - sigma) / (begin - end)


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
