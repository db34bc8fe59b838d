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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_skip.families import DEFAULT_FAMILY, FAMILIES, MODELS, Family, expert_of
from step_skip.files import (
    InputError,
    check_sha256,
    folder_inside,
    read_file,
    sha256_file,
)
from step_skip.schema import METADATA_FILE
from step_skip.tensor_file import load_tensor

if TYPE_CHECKING:
    import torch

INITIAL_LATENTS_FILE = "initial_latents.pt"
IMAGE_FILE = "input_image.png"
END_IMAGE_FILE = "end_image.png"
OUTPUT_FILE = "output_full.mp4"
PREVIEW_FILE = "preview.webp"
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
CLIP = "clip"  # the prior_kind of one that was made of a clip
SCHEDULE_FLAGS = ("num_inference_steps", "denoising_strength", "sigma_shift")  # what fixes it


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What fixes the schedule, the shape and the cost of a run; the names are WanVideoPipeline's.

    cfg_scale: one for all steps, or a tuple with one for each step that runs.
    skip_cache: ours; one step in so many runs all blocks (cheaper.py), None: all do.
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
    switch_DiT_boundary: float | None = None  # where the second of two experts takes over

    @property
    def size(self) -> tuple[int, int, int]:
        """Height, width (pixels) and number of frames."""
        return self.height, self.width, self.num_frames

    @property
    def pipeline_inputs(self) -> dict[str, Any]:
        """The settings that WanVideoPipeline takes."""
        left_out = ["skip_cache", *(["switch_DiT_boundary"] if self.switch_DiT_boundary is None else [])]
        return {name: value for name, value in vars(self).items() if name not in left_out}


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
        if self.is_legacy or self.kept_steps is not None:
            return self.num_inference_steps
        return leading_steps(self.metadata["files"], self.num_inference_steps, nega=self.keeps_nega)

    @property
    def keeps_nega(self) -> bool:
        """Whether the velocity of each step's negative branch is saved, too; older priors lack it."""
        return self.metadata.get("keeps_nega", False)

    @property
    def kept_steps(self) -> list[int] | None:
        """The steps that can be followed of a prior that was pruned to them; None: all."""
        return self.metadata.get("kept_steps")

    @property
    def is_of_clip(self) -> bool:
        """Whether it was made of a clip (clip_prior.py): it can be followed, in the steps that clip took."""
        return self.metadata.get("prior_kind") == CLIP

    @property
    def settings(self) -> RunSettings:
        """The settings of the run that made it."""
        return self.settings_after(-1)

    def settings_after(self, start_step: int) -> RunSettings:
        """The settings of that run as they are for its steps after this one."""
        names = {field.name for field in fields(RunSettings)}
        recorded = {name: value for name, value in self.metadata.items() if name in names}
        guidance = self.guidance[start_step + 1 :] or self.guidance[-1:]
        return RunSettings(**recorded | {"cfg_scale": one_or_each(guidance)})

    @property
    def guidance(self) -> list[float]:
        """The cfg_scale of each of its steps: of two experts each has its own."""
        own, second = self.metadata["cfg_scale"], self.metadata.get("cfg_scale_2")
        steps = range(self.num_inference_steps)
        return [own if second is None or self.expert_of(step) == "dit" else second for step in steps]

    def expert_of(self, step: int) -> str:
        """The network that takes a step: "dit", or of two experts "dit2" for the less noisy ones."""
        timestep = self.metadata["scheduler_timesteps"][step]
        return expert_of(timestep, self.metadata.get("switch_DiT_boundary"))

    @property
    def family(self) -> Family:
        """What its network takes; an older prior names none."""
        return FAMILIES[self.metadata.get("family", DEFAULT_FAMILY)]

    @property
    def latents_shape(self) -> tuple[int, ...]:
        """[B, C, T, H, W] of the latents."""
        m = self.metadata
        sizes = {name: m[name] for name in ("height", "width", "num_frames")}
        return latents_shape(**sizes, family=self.family)

    @property
    def image_files(self) -> list[str]:
        """The images it was made from, as the model saw them."""
        return [name for name in (IMAGE_FILE, END_IMAGE_FILE) if self.has(name)]

    @property
    def image_name(self) -> str | None:
        """What the file of its image was called; None: it has no image, or doesn't say."""
        return self.metadata.get("images", {}).get(IMAGE_FILE, {}).get("name") or None

    @property
    def identity_names(self) -> list[str]:
        """What it keeps of its images, by the pipeline's names; nothing where there is none."""
        lacks_image = self.family.image == "optional" and not self.has(IMAGE_FILE)
        return [] if lacks_image else list(self.family.conditioning)

    def has(self, name: str) -> bool:
        """Whether the prior records a file of this name."""
        return name in self.metadata.get("files", {})


def one_or_each(values: Sequence[float]) -> float | tuple[float, ...]:
    """One value where all are alike, else a tuple of them."""
    return values[0] if len(set(values)) == 1 else tuple(values)


# --- names and shapes ---------------------------------------------------------------------------------------


def step_file(step: int) -> str:
    """Name of the latents after `step`."""
    return f"step_{step:04d}.pt"


def noise_pred_file(step: int) -> str:
    """Name of the guided velocity of `step`."""
    return f"noise_pred_{step:04d}.pt"


def noise_pred_nega_file(step: int) -> str:
    """Name of the velocity of the negative branch of `step`."""
    return f"noise_pred_nega_{step:04d}.pt"


def step_files(step: int, *, nega: bool = False) -> tuple[str, ...]:
    """What there is of a step that is whole, with its negative branch or without."""
    return step_file(step), noise_pred_file(step), *([noise_pred_nega_file(step)] if nega else [])


def leading_steps(names: Iterable[str], num_inference_steps: int, *, nega: bool = False) -> int:
    """How many steps, from the first one on, have all their files among these."""
    names, steps = set(names), range(num_inference_steps)
    lacking = (step for step in steps if not names.issuperset(step_files(step, nega=nega)))
    return next(lacking, num_inference_steps)


def ranges(steps: Sequence[int]) -> str:
    """Steps as a person would write them: 0-2, 4-9."""
    starts = [step for step in steps if step - 1 not in steps]
    ends = [step for step in steps if step + 1 not in steps]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in pairs)


def denoised_file(step: int) -> str:
    """Name of the video of what `step` points at."""
    return f"denoised_{step:04d}.mp4"


def crop_preview_file(name: str) -> str:
    """Name of the picture that shows what was cropped from the image `name`."""
    return f"{Path(name).stem}_crop.png"


def latents_before_file(step: int) -> str:
    """Name of the latents `step` starts from."""
    return INITIAL_LATENTS_FILE if step == 0 else step_file(step - 1)


def context_file(text: str) -> str:
    """Name of an encoded prompt: the same text has the same name in every prior."""
    return f"context_{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt"


def latents_shape(
    *, height: int, width: int, num_frames: int, family: Family = FAMILIES[DEFAULT_FAMILY]
) -> tuple[int, ...]:
    """[B, C, T, H, W] of the latents of a video of this size (pixels, frames)."""
    frames = (num_frames - 1) // family.temporal_factor + 1
    factor = family.spatial_factor
    return (1, family.latent_channels, frames, height // factor, width // factor)


def bytes_of_prior(prior: Prior) -> int:
    """A safe upper bound of what a prior takes on disk, without its videos."""
    return bytes_of_steps(prior) * 4 // BYTES[prior.metadata["dtype"]] + 32 * 2**20


def bytes_of_steps(prior: Prior) -> int:
    """What the latents and velocities of its steps take on disk, about."""
    saved = 3 * prior.num_inference_steps + 4  # of each step, the noise, y
    return saved * math.prod(prior.latents_shape) * BYTES[prior.metadata["dtype"]]


def round_sizes(
    *, height: int, width: int, num_frames: int, family: Family = FAMILIES[DEFAULT_FAMILY]
) -> dict[str, int]:
    """The sizes WanVideoPipeline rounds these to, up and silently (`check_resize_height_width`)."""
    pixels, frames = 2 * family.spatial_factor, family.temporal_factor  # the DiT's patches are 2 x 2 latents
    return {
        "height": math.ceil(height / pixels) * pixels,
        "width": math.ceil(width / pixels) * pixels,
        "num_frames": math.ceil((num_frames - 1) / frames) * frames + 1,
    }


def identity_file(name: str) -> str:
    """Name of the file of what the network sees of the images, by the pipeline's name for it."""
    return f"{name}.pt"


def check_way(folder: Path) -> None:
    """Refuse a folder inside a prior to which a link leads: whoever made the prior may have laid it.

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
    """The bytes of a file, as the prior records it.

    Raises:
        InputError: see `check_files`.
    """
    if not prior.has(name):
        raise InputError(f"{METADATA_FILE} lists no {name}; the prior is incomplete: make it again")
    path = prior.directory / name
    content = read_file(path, most=largest_file(prior, name))
    check_sha256(path, hashlib.sha256(content).hexdigest(), prior.metadata["files"][name])
    return content


def recorded_sha256(prior: Prior, name: str) -> str | None:
    """What the prior says of a file; a legacy prior says nothing."""
    return prior.metadata.get("files", {}).get(name)


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


# --- tensors ------------------------------------------------------------------------------------------------


def load_latents(prior: Prior, name: str, *, sha256: str | None = None) -> torch.Tensor:
    """Load latents or a velocity, [B, C, T, H, W] in the prior's dtype, on the CPU.

    Args:
        sha256: of the file, where the prior records none.

    Raises:
        InputError: not a tensor, wrong shape or dtype, NaN or infinite values, or a pickle with code in it.
    """
    dtype, sha256 = prior.metadata.get("dtype"), recorded_sha256(prior, name) or sha256
    return load_tensor(prior.directory / name, shape=prior.latents_shape, dtype=dtype, sha256=sha256)


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
    """Load what is kept of an image, or a context, in the prior's dtype and recorded shape, on the CPU.

    Raises:
        InputError: see `load_latents`; or what is kept of an image can't be what this model takes.
    """
    m, shape = prior.metadata, tuple(prior.metadata["shapes"][name])
    expected = _identity_shapes(prior).get(name, shape)
    if shape != expected:
        raise InputError(
            f"{METADATA_FILE} has {list(shape)} as the shape of {name}, expected {list(expected)}; make the "
            "prior again"
        )
    path, sha256 = prior.directory / name, recorded_sha256(prior, name)
    return load_tensor(path, shape=shape, dtype=m["dtype"], sha256=sha256)


def _identity_shapes(prior: Prior) -> dict[str, tuple[int, ...]]:
    """The shapes of what is kept of the images, by file, where the model is a published one."""
    if prior.metadata["model"] not in MODELS:
        return {}
    _, _, *sizes = prior.latents_shape
    places = dict(zip("THW", sizes, strict=True))
    return {
        identity_file(name): tuple(size if isinstance(size, int) else places[size] for size in shape)
        for name, shape in prior.family.conditioning.items()
    }
