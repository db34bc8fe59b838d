"""Describe a prior: its metadata, the names and shapes of its files, the steps that can be followed."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from step_skip.errors import InputError
from step_skip.files.tensors import BYTES
from step_skip.method.steps import nearest_steps, spread_steps
from step_skip.models.families import FAMILIES, Family, expert_of, latents_shape
from step_skip.pipeline.settings import SCHEDULE_FLAGS, RunSettings, one_or_each
from step_skip.prior.schema import Metadata

INITIAL_LATENTS_FILE = "initial_latents.pt"
IMAGE_FILE = "input_image.png"
END_IMAGE_FILE = "end_image.png"
OUTPUT_FILE = "output_full.mp4"
PREVIEW_FILE = "preview.webp"
MADE_OF_CLIP = "clip"  # the prior_kind of one that was made of a clip


@dataclass(frozen=True)
class Prior:
    """A prior's folder and its metadata, checked for form by `read_prior`."""

    directory: Path
    metadata: Metadata

    @property
    def num_inference_steps(self) -> int:
        return self.metadata.num_inference_steps

    @property
    def is_legacy(self) -> bool:
        """True for a prior of the pull request's scripts: latents and schedule, nothing else."""
        return self.metadata.format_version is None

    @property
    def is_complete(self) -> bool:
        """False for a prior that was stopped early (--stop_after) or interrupted."""
        return self.is_legacy or self.metadata.status == "complete"

    @property
    def whole_steps(self) -> int:
        """How many steps are recorded, from the first one on, each with latents and velocity."""
        if self.is_legacy or self.kept_steps is not None:
            return self.num_inference_steps
        return leading_steps(self.metadata.files, self.num_inference_steps, nega=self.keeps_nega)

    @property
    def keeps_nega(self) -> bool:
        """Whether the velocity of each step's negative branch is saved, too; older priors lack it."""
        return self.metadata.keeps_nega

    @property
    def kept_steps(self) -> list[int] | None:
        """The steps that can be followed of a prior that was pruned to them; None: all."""
        return self.metadata.kept_steps

    @property
    def is_of_clip(self) -> bool:
        """Whether it was made of a clip (infer/as_prior.py): it can be followed only in that clip's steps."""
        return self.metadata.prior_kind == MADE_OF_CLIP

    @property
    def schedule_settings(self) -> dict[str, Any]:
        """What its schedule is computed from, by the names of SCHEDULE_FLAGS."""
        return {name: getattr(self.metadata, name) for name in SCHEDULE_FLAGS}

    @property
    def texts(self) -> tuple[str, str]:
        """Its prompt and negative prompt.

        Raises:
            ValueError: it is of the older format, which records none.
        """
        prompt, negative_prompt = self.metadata.prompt, self.metadata.negative_prompt
        if prompt is None or negative_prompt is None:
            raise ValueError(f"{self.directory} is of the older format, which records no prompts")
        return prompt, negative_prompt

    @property
    def fps(self) -> float:
        """The frames per second of its own video; 16 if it records none."""
        return 16 if self.metadata.fps is None else self.metadata.fps

    @property
    def settings(self) -> RunSettings:
        """The settings of the run that made it."""
        return self.settings_after(-1)

    def settings_after(self, start_step: int) -> RunSettings:
        """Return the settings of its run for the steps after this one."""
        recorded = recorded_settings(self)
        guidance = self.guidance[start_step + 1 :] or self.guidance[-1:]
        return RunSettings(**recorded | {"cfg_scale": one_or_each(guidance)})

    @property
    def guidance(self) -> list[float]:
        """The cfg_scale of each of its steps: of two experts each has its own."""
        own, second = self.metadata.cfg_scale, self.metadata.cfg_scale_2
        if own is None:
            raise ValueError(f"{self.directory} is of the older format, which records no cfg_scale")
        steps = range(self.num_inference_steps)
        return [own if second is None or self.expert_of(step) == "dit" else second for step in steps]

    def expert_of(self, step: int) -> str:
        """Return the network of a step: "dit", or of two experts "dit2" for the less noisy steps."""
        timestep = self.metadata.scheduler_timesteps[step]
        return expert_of(timestep, self.metadata.switch_DiT_boundary)

    @property
    def family(self) -> Family:
        """The family of its model: what its network takes."""
        return FAMILIES[self.metadata.family]

    @property
    def latents_shape(self) -> tuple[int, ...]:
        """[B, C, T, H, W] of the latents."""
        return latents_shape(**self.metadata.sizes, family=self.family)

    @property
    def image_files(self) -> list[str]:
        """The images it was made from, as the model saw them."""
        return [name for name in (IMAGE_FILE, END_IMAGE_FILE) if self.has(name)]

    @property
    def image_name(self) -> str | None:
        """The name of its image's file; None: it has no image, or records no name."""
        image = self.metadata.images.get(IMAGE_FILE)
        return None if image is None else image.name or None

    @property
    def identity_names(self) -> list[str]:
        """The identity tensors that it keeps, by the pipeline's names; none without an image."""
        lacks_image = self.family.image == "optional" and not self.has(IMAGE_FILE)
        return [] if lacks_image else list(self.family.conditioning)

    def has(self, name: str) -> bool:
        """Return whether the prior records a file of this name."""
        return name in self.metadata.files


def recorded_settings(prior: Prior) -> dict[str, Any]:
    """Return what a prior records of the settings of its run, by the names of RunSettings."""
    names = [field.name for field in fields(RunSettings)]
    return {name: getattr(prior.metadata, name) for name in names if name in prior.metadata.model_fields_set}


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
    """Return the names of the files of a whole step, with its negative branch or without."""
    return step_file(step), noise_pred_file(step), *([noise_pred_nega_file(step)] if nega else [])


def leading_steps(names: Iterable[str], num_inference_steps: int, *, nega: bool = False) -> int:
    """Count the steps, from the first one on, that have all their files among these."""
    names, steps = set(names), range(num_inference_steps)
    lacking = (step for step in steps if not names.issuperset(step_files(step, nega=nega)))
    return next(lacking, num_inference_steps)


def step_ranges(steps: Sequence[int]) -> str:
    """Return steps as ranges: 0-2, 4-9."""
    starts = [step for step in steps if step - 1 not in steps]
    ends = [step for step in steps if step + 1 not in steps]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in pairs)


def denoised_file(step: int) -> str:
    """Name of the video of a step's denoised estimate."""
    return f"denoised_{step:04d}.mp4"


def latents_before_file(step: int) -> str:
    """Name of the latents `step` starts from."""
    return INITIAL_LATENTS_FILE if step == 0 else step_file(step - 1)


def context_file(text: str) -> str:
    """Name of an encoded prompt: the same text has the same name in every prior."""
    return f"context_{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt"


def bytes_of_prior(prior: Prior) -> int:
    """Return a safe upper bound of what a prior takes on disk without its videos, in bytes."""
    return bytes_of_steps(prior) * 4 // BYTES[prior.metadata.dtype or "float32"] + 32 * 2**20


def bytes_of_steps(prior: Prior) -> int:
    """Estimate what the latents and velocities of a prior's steps take on disk, in bytes."""
    saved = 3 * prior.num_inference_steps + 4  # of each step, the noise, y
    return saved * math.prod(prior.latents_shape) * BYTES[prior.metadata.dtype or "float32"]


def identity_file(name: str) -> str:
    """Name of the file of an identity tensor, by the pipeline's name for it."""
    return f"{name}.pt"


LABELS: Final = {IMAGE_FILE: "--image", END_IMAGE_FILE: "--end_image"}


def number_of_steps(prior: Prior) -> int:
    """Return the largest number of steps in which a prior can be followed."""
    return prior.num_inference_steps if prior.kept_steps is None else len(prior.kept_steps)


def usual_steps(prior: Prior, number: int) -> list[int]:
    """Return the usual steps of a differential resume of this length, or the nearest that the prior keeps."""
    steps = spread_steps(prior.num_inference_steps, number)
    return steps if prior.kept_steps is None else nearest_steps(steps, prior.kept_steps)


def experts_of(steps: Sequence[int], sigmas: Sequence[float] | None, prior: Prior) -> list[str]:
    """Return the network of each step of a run: "dit", or of two experts "dit2" for the less noisy steps.

    Args:
        steps: of the prior's schedule; with sigmas, indices into these.
    """
    if sigmas is None:
        return [prior.expert_of(step) for step in steps]
    boundary = prior.metadata.switch_DiT_boundary
    return [expert_of(_float32(1000 * _float32(sigma)), boundary) for sigma in sigmas]


def _float32(value: float) -> float:
    """Round a value to float32, as the scheduler's sigmas and timesteps are."""
    return struct.unpack("f", struct.pack("f", value))[0]


def choose_guidance(
    prior: Prior,
    *,
    cfg_scale: float | Sequence[float] | None,
    cfg_scale_2: float | None,
    default: float,
    experts: Sequence[str],
) -> float | tuple[float, ...]:
    """Return one cfg_scale for all steps that run, or a tuple of one for each; two experts may differ.

    Args:
        cfg_scale, cfg_scale_2: as chosen; None: the prior's, the second only where the first isn't chosen.
        default: of an older prior, which records none.
        experts: of the steps that run.

    Raises:
        InputError: neither one value nor as many as there are steps, or a second one without a use.
    """
    m = prior.metadata
    own = default if m.cfg_scale is None else m.cfg_scale
    first = own if cfg_scale is None else cfg_scale
    values = list(first) if isinstance(first, Sequence) else [first]
    second = m.cfg_scale_2 if cfg_scale is None and cfg_scale_2 is None else cfg_scale_2
    given = values if second is None else [*values, second]
    if not all(isinstance(value, int | float) and 0 < value < math.inf for value in given):
        raise InputError(f"--cfg_scale {first}: expected numbers above 0")
    if len(values) not in (1, len(experts)):
        raise InputError(
            f"--cfg_scale: {len(values)} values, and {len(experts)} steps run; give one, or one for each step"
        )
    if cfg_scale_2 is not None and m.switch_DiT_boundary is None:
        raise InputError("--cfg_scale_2 is of two experts' second, and this model has one: leave it out")
    if cfg_scale_2 is not None and len(values) > 1:
        raise InputError("--cfg_scale has a value for each step already: leave --cfg_scale_2 out")
    if second is None or not experts:
        return one_or_each(values)
    return one_or_each([values[0] if expert == "dit" else second for expert in experts])
