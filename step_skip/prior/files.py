"""A prior on disk: what its files are called, what they hold, and that they are what was written.

A prior is a folder `run_<id>/`:

    run_metadata.json        settings, schedule, SHA-256 of every other file, shapes; what it names is whole
    initial_latents.pt       latents before step 0, at sigmas[0]: the noise (plus the video of --input_video)
    step_0000.pt ...         latents *after* step i, that is, at sigmas[i + 1]; the last ones are clean
    noise_pred_0000.pt ...   the velocity of step i after guidance (DiffSynth calls it noise_pred)
    noise_pred_nega_0000.pt  that of its negative branch, where there is guidance and no cache
    y.pt, clip_feature.pt    what the model sees of the input image, by the names of families.py
    context_<hash>.pt        one encoded prompt each, named after the text
    input_image.png          the input image as the model saw it, if there was one
    end_image.png            likewise, of a model that takes a last frame, too
    input_image_crop.png     what of the image was cropped away, in the dark; no part of the prior
    preview.webp             with --preview: what the last step so far points at; no part of the prior
    output_full.mp4          the prior's own video
    formation.png            how it took shape, step by step (steps.py)
    denoised_0000.mp4 ...    with --save_decoded_videos or --stop_after: what step i points at, decoded
    contexts/                prompts that were encoded later; no part of the prior
    outputs/                 the videos infer_from_prior.py makes from it; no part of the prior

Every .pt file holds one tensor in the pipeline's dtype: converting it would break bit-exactness.
Resuming from `start_step` loads `step_<start_step>.pt` and runs steps start_step + 1 ... N - 1.
metadata.py reads and checks run_metadata.json. Neither knows a pipeline.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from step_skip.errors import InputError
from step_skip.files.reading import check_sha256, read_file, sha256_file
from step_skip.files.tensors import load_tensor
from step_skip.files.writing import folder_inside
from step_skip.models.families import MODELS
from step_skip.prior.prior import (
    INITIAL_LATENTS_FILE,
    Prior,
    identity_file,
    latents_before_file,
    noise_pred_file,
    step_file,
)
from step_skip.prior.schema import METADATA_FILE

if TYPE_CHECKING:
    import torch


def check_way(folder: Path) -> None:
    """Refuse a folder inside a prior to which a link leads: the prior may come from an untrusted source.

    Raises:
        InputError: with the link.
    """
    whole = folder.absolute()
    for parent in whole.parents:
        if (parent / METADATA_FILE).is_file():
            folder_inside(parent, *whole.relative_to(parent).parts)


# --- whole files --------------------------------------------------------------------------------------------


def check_files(prior: Prior, names: Iterable[str]) -> dict[str, str]:
    """Compare files with their recorded SHA-256, and return it by name. A legacy prior recorded none.

    Raises:
        InputError: a file is missing, unreadable, leads out of the prior, or is not what was written.
    """
    digests = {}
    for name in names:
        path = prior.directory / name
        digests[name] = found = sha256_file(path, most=largest_file(prior, name), follow=False)
        if not prior.is_legacy and not prior.has(name):
            raise InputError(f"{METADATA_FILE} lists no {name}; the prior is incomplete: make it again")
        check_sha256(path, found, recorded_sha256(prior, name) or found)
    return digests


def read_own_file(prior: Prior, name: str) -> bytes:
    """Return the bytes of a file, checked against its recorded SHA-256.

    Raises:
        InputError: see `check_files`.
    """
    if not prior.has(name):
        raise InputError(f"{METADATA_FILE} lists no {name}; the prior is incomplete: make it again")
    path = prior.directory / name
    content = read_file(path, most=largest_file(prior, name))
    check_sha256(path, hashlib.sha256(content).hexdigest(), prior.metadata.files[name])
    return content


def recorded_sha256(prior: Prior, name: str) -> str | None:
    """Return the recorded SHA-256 of a file; None: a legacy prior records none."""
    return prior.metadata.files.get(name)


def largest_file(prior: Prior, name: str) -> int:
    """Return a safe upper bound of a file's bytes, so that no time or memory goes into a wrong file."""
    m = prior.metadata
    if name.endswith(".pt"):  # a context of Wan2.1 has 8 MiB
        return 2 * 4 * math.prod(prior.latents_shape) + 2**26
    return m.height * m.width * 3 * (m.num_frames + 1) + 2**22


def recorded_files(prior: Prior) -> list[str]:
    """Return the names of the files that a prior consists of, besides its metadata."""
    if prior.is_legacy:
        return [step_file(step) for step in range(prior.num_inference_steps)]
    return list(prior.metadata.files)


def damaged_files(prior: Prior, *, load: bool = False) -> dict[str, str]:
    """Check every file of a prior; return by name what is wrong with it.

    Args:
        load: load each tensor, too: of a legacy prior, which records no SHA-256, nothing else tells.
    """
    problems = {}
    for name in recorded_files(prior):
        try:
            if not (load and name.endswith(".pt")):
                check_files(prior, [name])
            elif name.startswith(("step_", "noise_pred_", INITIAL_LATENTS_FILE)):
                load_latents(prior, name)
            else:
                load_conditioning(prior, name)
        except InputError as error:
            problems[name] = str(error)
    return problems


# --- tensors ------------------------------------------------------------------------------------------------


def load_latents(prior: Prior, name: str, *, sha256: str | None = None) -> torch.Tensor:
    """Load latents or a velocity, [B, C, T, H, W] in the prior's dtype, on the CPU.

    Args:
        sha256: of the file, where the prior records none.

    Raises:
        InputError: not a tensor, wrong shape or dtype, NaN or infinite values, or a pickle with code in it.
    """
    dtype, sha256 = prior.metadata.dtype, recorded_sha256(prior, name) or sha256
    return load_tensor(prior.directory / name, shape=prior.latents_shape, dtype=dtype, sha256=sha256)


def load_denoised(prior: Prior, step: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Load a step's denoised estimate, latents - sigma * noise_pred: [B, C, T, H, W], on the CPU.

    Args:
        dtype: to compute in; None: the prior's.

    Raises:
        InputError: see `load_latents`.
    """
    latents, noise_pred = (
        load_latents(prior, name).to(dtype=dtype)
        for name in (latents_before_file(step), noise_pred_file(step))
    )
    return latents - prior.metadata.scheduler_sigmas[step] * noise_pred


def load_conditioning(prior: Prior, name: str) -> torch.Tensor:
    """Load what is kept of an image, or a context, in the prior's dtype and recorded shape, on the CPU.

    Raises:
        InputError: see `load_latents`; or what is kept of an image can't be what this model takes.
    """
    m, shape = prior.metadata, tuple(prior.metadata.shapes[name])
    expected = _identity_shapes(prior).get(name, shape)
    if shape != expected:
        raise InputError(
            f"{METADATA_FILE} has {list(shape)} as the shape of {name}, expected {list(expected)}; make the "
            "prior again"
        )
    path, sha256 = prior.directory / name, recorded_sha256(prior, name)
    return load_tensor(path, shape=shape, dtype=m.dtype, sha256=sha256)


def _identity_shapes(prior: Prior) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the identity tensors by file, for a published model."""
    if prior.metadata.model not in MODELS:
        return {}
    _, _, *sizes = prior.latents_shape
    places = dict(zip("THW", sizes, strict=True))
    return {
        identity_file(name): tuple(size if isinstance(size, int) else places[size] for size in shape)
        for name, shape in prior.family.conditioning.items()
    }
