"""Choose where weights are stored while a model runs (`pick_vram`), and estimate and measure memory and disk.

    mode     the encoders' weights   the weights of DiT and VAE
    plain    in host memory          in VRAM
    cpu      in host memory          in host memory
    low      on the disk             in host memory
    disk     on the disk             on the disk
    auto     the first of these modes that fits into the free memory

DiffSynth's VRAM management moves a component to the GPU before it runs, and keeps it there while there is
room: the encoders are offloaded while the DiT runs, and only the mode `disk` reads a DiT more than once. On a
CPU, VRAM is host memory.

Two experts take turns: in each mode one of them is loaded at a time.

Estimates are exact for weights. Activations were counted on the meta device with diffsynth 2.1.12's full-size
classes (benchmarks/activations.py), without the workspaces of attention kernels; no estimate was compared
with a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import shutil
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from step_skip.errors import InputError
from step_skip.files.tensors import read_header
from step_skip.models.families import FAMILIES, MODEL_NAMES, MODELS, latents_shape
from step_skip.models.weights import (
    ENCODERS,
    EXPERTS,
    TINY_DIR,
    LoadOptions,
    family_name,
    model_defaults,
    read_tiny_config,
)

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Home = Literal["device", "cpu", "disk"]
HOMES: Final[Mapping[str, tuple[Home, Home]]] = {  # by mode: of the encoders, of DiT and VAE
    "plain": ("cpu", "device"),
    "cpu": ("cpu", "cpu"),
    "low": ("disk", "cpu"),
    "disk": ("disk", "disk"),
}
GIB = 2**30
VALUE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
SPARED_VRAM = 2 * GIB  # VRAM that stays free, as in DiffSynth's examples
DEVICE_BASE = 3 * GIB // 2  # CUDA's context, workspaces of its libraries, fragmentation of the allocator
HOST_BASE = 2 * GIB  # Python, torch and its libraries
LAYER = GIB // 2  # the largest layer of a 14B model while it is read from the disk
# Number of activation values, by benchmarks/activations.py: of a DiT per token and channel, most of them in
# the rotary embedding, which DiffSynth computes in float64; of a VAE per pixel of a frame that is decoded at
# once. TI2V has more, because each token has its own modulation.
DIT_VALUES = {"I2V": 16, "TI2V": 27}
VAE_VALUES = {8: 5_150, 16: 5_650}  # by the family's spatial factor
TILE_LATENTS = 30 * 52  # tile_size of pipeline/settings.TILING
CHANNELS = {10**10: 5120, 3 * 10**9: 3072, 0: 1536}  # of a published DiT, by its least number of parameters


# --- modes --------------------------------------------------------------------------------------------------


def offload_config(mode: str, component: str, *, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return the offloading arguments of DiffSynth's ModelConfig; empty if the weights stay on the device.

    Args:
        mode: a key of HOMES.
        component: one of weights.COMPONENTS.
    """
    import torch

    home = HOMES[mode][component not in ENCODERS]
    is_cpu = torch.device(device).type == "cpu"
    if home == "device" or (home == "cpu" and is_cpu):
        return {}
    resting = (home, "disk" if home == "disk" else dtype)
    working = (device, dtype)
    keeps_none = (
        is_cpu and home == "disk"
    )  # DiffSynth keeps prepared weights, here they would fill host memory
    stages = {
        "offload": resting,
        "onload": resting,
        "preparing": resting if keeps_none else working,
        "computation": working,
    }
    devices = {f"{stage}_device": target for stage, (target, _) in stages.items()}
    return devices | {f"{stage}_dtype": kind for stage, (_, kind) in stages.items()}


def vram_limit(device: str) -> float | None:
    """Return the GiB of used VRAM up to which DiffSynth keeps weights there; None on a CPU: no limit."""
    import torch

    if torch.device(device).type == "cpu":
        return None
    return (torch.cuda.mem_get_info(device)[1] - SPARED_VRAM) / GIB


def pick_vram(options: LoadOptions, components: Collection[str]) -> str:
    """Return the mode to run in: the given one or, for "auto", the first that fits into the free memory.

    Args:
        components: the components in memory at once.
    """
    if options.vram != "auto":
        return options.vram
    if options.model not in MODELS or options.quantize is not None:
        return "plain"
    free = free_memory(options.device)
    return next((mode for mode in HOMES if expected_memory(options, components, mode).fits(free)), "disk")


# --- before a run -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of VRAM (0 on a CPU) and of host memory."""

    vram: int
    host: int

    def fits(self, free: Memory) -> bool:
        """Return whether this much memory fits into the free memory."""
        return self.vram <= free.vram and self.host <= free.host

    def __str__(self) -> str:
        vram = f"{self.vram / GIB:.1f} GiB of VRAM and " if self.vram else ""
        return f"{vram}{self.host / GIB:.1f} GiB of host memory"


def expected_memory(options: LoadOptions, components: Collection[str], mode: str) -> Memory:
    """Return the expected peak memory of a run in a mode, with these components in memory at once."""
    import torch

    weights = weight_bytes(options, components)
    encoders = sum(weights[name] for name in ENCODERS if name in weights)
    networks = sum(weights.values()) - encoders
    resting: dict[Home, int] = {"device": 0, "cpu": 0, "disk": LAYER}
    for home, size in zip(HOMES[mode], (encoders, networks), strict=True):
        resting[home] += size if home != "disk" else 0
    if options.quantize is not None:  # a DiT is loaded into host memory as a whole before it is quantised
        whole = weight_bytes(dataclasses.replace(options, quantize=None), components)
        resting["cpu"] += sum(whole[name] for name in EXPERTS if name in whole)
    activations = activation_bytes(options)
    if torch.device(options.device).type == "cpu":
        return Memory(0, HOST_BASE + resting["device"] + resting["cpu"] + activations)
    return Memory(DEVICE_BASE + resting["device"] + LAYER + activations, HOST_BASE + resting["cpu"])


def weight_bytes(options: LoadOptions, components: Collection[str]) -> dict[str, int]:
    """Return the size of each component's weights in memory while it runs, in bytes."""
    if options.model in MODELS:
        published = MODELS[options.model].weights
        counts = {name: published[name].parameters for name in components if name in published}
    else:
        counts = {name: _count_parameters(options, name) for name in components}
    sizes = {name: count * VALUE_BYTES[options.dtype] for name, count in counts.items()}
    if options.quantize is not None:
        sizes |= {name: count for name, count in counts.items() if name in EXPERTS}  # one byte each
    return sizes


def _count_parameters(options: LoadOptions, component: str) -> int:
    """Return the number of parameters in an embedded model's file; 0 if there is no such file."""
    path = (options.model_dir or TINY_DIR) / f"{component}.safetensors"
    shapes = read_header(path, what=f"the {component}").shapes if path.is_file() else {}
    return sum(map(math.prod, shapes.values()))


def activation_bytes(options: LoadOptions) -> int:
    """Return the peak activation memory of a run, in bytes: of a DiT forward or of decoding."""
    return max(dit_activation_bytes(options), vae_activation_bytes(options, tiled=options.tiled))


def dit_activation_bytes(options: LoadOptions) -> int:
    """Return the activation memory of one DiT forward, in bytes."""
    height, width, num_frames = _size(options)
    family = family_name(options.model, options.model_dir)
    shape = latents_shape(height=height, width=width, num_frames=num_frames, family=FAMILIES[family])
    if options.model in MODELS:
        parameters = MODELS[options.model].weights["dit"].parameters
        channels = next(channels for least, channels in CHANNELS.items() if parameters >= least)
    else:
        channels = read_tiny_config(options.model_dir or TINY_DIR)["dit"]["dim"]
    tokens = math.prod(shape[2:]) // 4  # a token is a patch of 2 x 2 latents
    return DIT_VALUES.get(family, DIT_VALUES["I2V"]) * channels * tokens * VALUE_BYTES[options.dtype]


def vae_activation_bytes(options: LoadOptions, *, tiled: bool) -> int:
    """Return the activation memory of decoding, in bytes, with whole frames or DiffSynth's default tiles."""
    height, width, _ = _size(options)
    factor = FAMILIES[family_name(options.model, options.model_dir)].spatial_factor
    pixels = min(height * width, TILE_LATENTS * factor**2) if tiled else height * width
    return VAE_VALUES[factor] * pixels * VALUE_BYTES[options.dtype]


def in_tiles(
    choice: bool | str, model: str, sizes: Mapping[str, int], *, model_dir: Path | None = None
) -> bool:
    """Return whether a VAE decodes in tiles; "auto" does if whole frames need more memory than the DiT.

    Args:
        choice: True, False or "auto".
        sizes: height, width and num_frames; other entries are ignored.
    """
    if choice != "auto" or model not in MODEL_NAMES:  # the sizes of a user's own pipeline are unknown
        return bool(choice)
    size = (sizes["height"], sizes["width"], sizes["num_frames"])
    options = LoadOptions(model, "cpu", "bfloat16", model_dir=model_dir, size=size)
    return vae_activation_bytes(options, tiled=False) > dit_activation_bytes(options)


def _size(options: LoadOptions) -> tuple[int, int, int]:
    """Return height, width and number of frames: those of the run, else the model's defaults."""
    defaults = model_defaults(options.model, options.model_dir)
    return options.size or (defaults.height, defaults.width, defaults.num_frames)


def free_memory(device: str) -> Memory:
    """Return the free VRAM and the free host memory, within the limit of a container."""
    import psutil
    import torch

    host = psutil.virtual_memory().available
    for folder in map(Path, ("/sys/fs/cgroup", "/sys/fs/cgroup/memory")):  # versions 2 and 1
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            with contextlib.suppress(OSError, ValueError):  # no such file, or the limit is "max"
                most, taken = (int((folder / name).read_text()) for name in (limit, used))
                host = min(host, most - taken + _file_cache(folder))
    is_cpu = torch.device(device).type == "cpu"
    return Memory(0 if is_cpu else torch.cuda.mem_get_info(device)[0], host)


def _file_cache(folder: Path) -> int:
    """Return the bytes of file cache that a cgroup counts as used but frees when memory is needed."""
    lines = (folder / "memory.stat").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def log_expected_memory(options: LoadOptions, components: Collection[str]) -> None:
    """Log the expected memory of a run in its mode, and warn if less is free."""
    expected, free = expected_memory(options, components, options.vram), free_memory(options.device)
    log.info(f"--vram {options.vram}: expects about {expected}; {free} are free")
    if not expected.fits(free):
        log.warning(
            "that is more than is free, and the run may run out of memory; try --vram low or disk, "
            "fewer --num_frames, or a smaller size"
        )


def log_memory_of_modes(options: LoadOptions, components: Collection[str]) -> None:
    """Log the expected memory of a run in each mode and, if the device exists, the mode that auto takes."""
    import torch

    modes = HOMES if options.model in MODELS and options.quantize is None else ("plain",)
    for mode in modes:
        log.info(f"--vram {mode}: expects about {expected_memory(options, components, mode)}")
    if torch.device(options.device).type == "cpu" or torch.cuda.is_available():
        mode, free = pick_vram(options, components), free_memory(options.device)
        log.info(f"{free} are free: it would run with --vram {mode}")


# --- before a download --------------------------------------------------------------------------------------


def bytes_to_fetch(options: LoadOptions, components: Collection[str]) -> dict[str, int]:
    """Return the bytes that DiffSynth would download of each component, without existing or named files."""
    skipped = os.environ.get("DIFFSYNTH_SKIP_DOWNLOAD", "").lower() == "true"
    if options.model not in MODELS or options.model_dir is not None or skipped:
        return {}
    published, base = MODELS[options.model].weights, model_base()
    left = {}
    for name in components:
        if name in published:
            files = (base / published[name].model_id).glob(published[name].pattern)
            left[name] = published[name].file_bytes - sum(path.stat().st_size for path in files)
    return {name: size for name, size in left.items() if size > 0.02 * published[name].file_bytes}


def model_base() -> Path:
    """Return the folder into which DiffSynth's ModelConfig downloads."""
    return Path(os.environ.get("DIFFSYNTH_MODEL_BASE_PATH", "./models"))


def check_download(options: LoadOptions, components: Collection[str]) -> None:
    """Log the size of a pending download, and check that the disk has room for it.

    Raises:
        InputError: the disk has less free space.
    """
    sizes, base = bytes_to_fetch(options, components), model_base()
    if not sizes:
        return
    there = next(parent for parent in (base.absolute(), *base.absolute().parents) if parent.exists())
    free, needed = shutil.disk_usage(there).free, sum(sizes.values())
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in sizes.items())
    pending = f"{needed / GIB:.1f} GiB of weights to download to {base} ({parts})"
    if free < needed:
        raise InputError(
            f"{pending}, and {free / GIB:.1f} GiB are free there; free some space, name another disk with "
            "DIFFSYNTH_MODEL_BASE_PATH, or a folder that has the weights with --model_dir"
        )
    log.info(f"{pending}; {free / GIB:.1f} GiB are free there")


# --- after a run --------------------------------------------------------------------------------------------


def begin_peak(device: str) -> None:
    """Reset the recorded peak of VRAM."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: str) -> dict[str, int | None]:
    """Return the peak memory in bytes: of VRAM by torch's allocator, of host memory by this process."""
    import torch

    on_gpu = torch.device(device).type == "cuda"
    return {
        "vram": torch.cuda.max_memory_reserved(device) if on_gpu else None,
        "host": _peak_of_process(),
    }


def describe_peak(peak: Mapping[str, int | None]) -> str:
    """Return the result of `peak_memory` as a text."""
    parts = {"GiB of VRAM": peak.get("vram"), "GiB of host memory": peak.get("host")}
    known = " and ".join(f"{size / GIB:.1f} {unit}" for unit, size in parts.items() if size is not None)
    return f"peak memory: {known or 'unknown'}"


def _peak_of_process() -> int | None:
    if sys.platform == "win32":  # Windows has no getrusage
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
