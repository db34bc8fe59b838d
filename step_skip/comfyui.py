"""Export a prior's latents as ComfyUI's .latent files, and import a run of ComfyUI as a prior.

A .latent file is written and read by ComfyUI's nodes SaveLatent and LoadLatent (its nodes.py): a safetensors
file with latents in the VAE's scale. Noisy latents are divided by 1 - sigma, because a sampler that continues
without adding noise multiplies by it (its comfy/model_sampling.py, CONST):

    latent = mean + std * latents / (1 - sigma)      mean, std: its comfy/latent_formats.py, Wan21

So all latents of a run can be exported except the initial noise, for which sigma is 1.

`export_latents` writes such a file, `import_run` makes a prior of such files.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from step_skip.errors import InputError
from step_skip.files.bounds import MAX_LATENT_BYTES
from step_skip.files.reading import read_file
from step_skip.files.tensors import load_safetensors
from step_skip.files.writing import check_free, replacing, write_json
from step_skip.pipeline.settings import check_distinct
from step_skip.prior.files import check_files, load_latents
from step_skip.prior.prior import Prior, step_file
from step_skip.prior.schema import METADATA_FILE, read_entries
from step_skip.prior.writer import PriorWriter, create_run_dir

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
SIGMAS = 1000  # number of sigmas from which ComfyUI's scheduler "simple" takes those of its steps
# Keys of a .latent file; without the second LoadLatent scales by 1 / 0.18215.
LATENTS, MARK = "latent_tensor", "latent_format_version_0"


def to_comfyui(latents: torch.Tensor, sigma: float) -> torch.Tensor:
    """Convert latents at a sigma below 1 to a LATENT of ComfyUI, in float32; both [B, 16, T, H, W]."""
    mean, std = statistics()
    return mean + std * latents.float() / (1 - sigma)


def from_comfyui(latent: torch.Tensor, sigma: float) -> torch.Tensor:
    """Convert a LATENT of ComfyUI at a sigma below 1 to latents, in float32; both [B, 16, T, H, W]."""
    mean, std = statistics()
    return (latent.float() - mean) / std * (1 - sigma)


def statistics() -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of the latents of Wan2.1's VAE, [1, 16, 1, 1, 1] each."""
    import torch

    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (MEAN, STD))
    return mean, std


def export_latents(prior: Prior, path: Path, *, step: int | None = None) -> Path:
    """Write the latents after a step to a .latent file, and log the settings with which ComfyUI continues.

    Args:
        path: of the file to write.
        step: index of the step; None: the last one, whose latents are clean.

    Returns:
        The path.

    Raises:
        InputError: the latents are not those of Wan2.1's VAE, or the prior has no such step.
        TakenError: the file exists.
    """
    import torch
    from safetensors.torch import save

    steps = prior.num_inference_steps
    step = steps - 1 if step is None else step
    if prior.family.latent_channels != len(MEAN):
        raise InputError(
            f"{prior.directory} has {prior.family.latent_channels} latent channels, expected the {len(MEAN)} "
            "of Wan2.1's VAE; export a prior of a model with this VAE"
        )
    if not 0 <= step < steps:
        raise InputError(f"--step {step}: {prior.directory} has steps 0 to {steps - 1}; name one of them")
    check_free(path)
    check_files(prior, [step_file(step)])
    latent = to_comfyui(load_latents(prior, step_file(step)), sigmas_after(prior)[step])
    content = save({LATENTS: latent, MARK: torch.tensor([])})
    with replacing(path, overwrite=False) as temporary:
        temporary.write_bytes(content)
    warn_of_spacing(steps)
    shift = f"{prior.metadata.sigma_shift:g}"
    log.info(
        "clean latents: LoadLatent, VAEDecode"
        if step == steps - 1
        else f"to continue: LoadLatent, ModelSamplingSD3 with shift {shift}, KSamplerAdvanced with add_noise "
        f"disable, steps {steps}, start_at_step {step + 1}, euler, simple"
    )
    return path


def import_run(
    paths: Sequence[Path],
    output_dir: Path,
    *,
    sigma_shift: float,
    run_id: str | None = None,
    dtype: str = "bfloat16",
) -> Path:
    """Make a prior of a run of ComfyUI, and return the prior's folder.

    The prior has the older format, which records neither image nor prompt: infer_from_prior.py needs both.

    Args:
        paths: one .latent file for each step, in order.
        output_dir, run_id: the folder is `output_dir/run_<run_id>`; None: the first file's name.
        sigma_shift: of the run.
        dtype: in which the latents are stored, "bfloat16" for example.

    Raises:
        InputError: a file is not a .latent file of Wan2.1's VAE, or its shape differs from the others'.
    """
    import torch

    from step_skip.pipeline.schedulers import compute_schedule

    timesteps, sigmas = compute_schedule(
        num_inference_steps=len(paths), denoising_strength=1.0, sigma_shift=sigma_shift
    )
    check_distinct(timesteps)
    warn_of_spacing(len(paths))
    latents = [read_latent(path) for path in paths]
    for path, each in zip(paths, latents, strict=True):
        if each.shape != latents[0].shape:
            raise InputError(
                f"{path} has shape {list(each.shape)}, expected {list(latents[0].shape)} as in {paths[0]}; "
                "name the files of one run"
            )
    directory, run_id = create_run_dir(output_dir, run_id, name=paths[0].stem)
    frames, height, width = latents[0].shape[2:]
    entries = {
        "run_id": run_id,
        "num_inference_steps": len(paths),
        "denoising_strength": 1.0,
        "sigma_shift": sigma_shift,
        "scheduler_timesteps": timesteps,
        "scheduler_sigmas": sigmas,
        **{"height": 8 * height, "width": 8 * width, "num_frames": 4 * (frames - 1) + 1},
    }
    writer = PriorWriter(directory, read_entries(entries, is_legacy=True))
    for step, (latent, sigma) in enumerate(zip(latents, [*sigmas[1:], 0.0], strict=True)):
        writer.save_tensor(step_file(step), from_comfyui(latent, sigma).to(getattr(torch, dtype)))
    write_json(directory / METADATA_FILE, entries)
    return directory


def read_latent(path: Path) -> torch.Tensor:
    """Read a .latent file as LoadLatent does: float32, [1, 16, T, H, W].

    Raises:
        InputError: it is not a .latent file of Wan2.1's VAE.
    """
    import torch

    try:
        tensors = load_safetensors(read_file(path, most=MAX_LATENT_BYTES))
    except InputError:
        raise
    except Exception as error:  # safetensors raises errors of several types for other files
        raise InputError(
            f"{path} is not a .latent file of ComfyUI ({type(error).__name__}); save it again with SaveLatent"
        ) from error
    latent, names = tensors.get(LATENTS), ", ".join(sorted(tensors))
    if latent is None or MARK not in tensors:
        raise InputError(
            f"{path} holds {names or 'nothing'}, expected {LATENTS} and {MARK}; save it again with SaveLatent"
        )
    if latent.ndim != 5 or latent.shape[:2] != (1, len(MEAN)) or not torch.isfinite(latent).all():
        raise InputError(
            f"{path} holds {list(latent.shape)}, expected finite latents of one clip of Wan2.1, "
            f"[1, {len(MEAN)}, frames, height, width]; save one clip's latents"
        )
    return latent.float()


def warn_of_spacing(num_inference_steps: int) -> None:
    """Warn if the sigmas of ComfyUI's steps are not those of DiffSynth."""
    if SIGMAS % num_inference_steps:
        log.warning(
            f"{num_inference_steps} steps: ComfyUI's scheduler simple has slightly other sigmas than "
            f"DiffSynth; use a number of steps that divides {SIGMAS}, 10 or 50 for example"
        )


def sigmas_after(prior: Prior) -> list[float]:
    """Return the sigma at the end of each step."""
    return [*prior.metadata.scheduler_sigmas[1:], 0.0]
