"""What is put into WanVideoPipeline for the length of one call: units and a model_fn that see and replace.

Checked against diffsynth 2.1.12, diffsynth/pipelines/wan_video.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffsynth.diffusion.base_pipeline import PipelineUnit
from diffsynth.pipelines.wan_video import WanVideoPipeline

from step_skip.errors import InputError
from step_skip.models.families import expert_of
from step_skip.pipeline.conditioning import FUSED, IDENTITY_NAMES, Conditioning, StartCallback


class ForwardCounter:
    """A model_fn that counts the network evaluations of a run, and keeps both branches of the step that runs.

    WanVideoPipeline calls it with positive=True and then, where cfg_scale isn't 1, with positive=False.

    Args:
        known_nega: the first negative branch, where it is known already: it isn't evaluated. [B, C, T, H, W]
    """

    def __init__(self, model_fn: Callable[..., torch.Tensor], *, known_nega: torch.Tensor | None = None):
        self.model_fn = model_fn
        self.known_nega = known_nega
        self.forwards = 0
        self.noise_pred_posi: torch.Tensor | None = None
        self.noise_pred_nega: torch.Tensor | None = None  # None until it was asked for

    def __call__(self, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("positive", True):
            self.noise_pred_posi, self.noise_pred_nega = self.evaluate(**kwargs), None
            return self.noise_pred_posi
        if self.known_nega is None:
            self.noise_pred_nega = self.evaluate(**kwargs)
        else:
            self.noise_pred_nega, self.known_nega = self.known_nega.to(kwargs["latents"].device), None
        return self.noise_pred_nega

    def evaluate(self, **kwargs: Any) -> torch.Tensor:
        """One network evaluation; a first frame that is fused into the latents doesn't move."""
        self.forwards += 1
        noise_pred = self.model_fn(**kwargs)
        if not kwargs.get("fuse_vae_embedding_in_latents"):
            return noise_pred
        return torch.cat([torch.zeros_like(noise_pred[:, :, :1]), noise_pred[:, :, 1:]], 2)

    @property
    def branch_distance(self) -> float | None:
        """Norm of the difference of both branches; None where there is only one."""
        if self.noise_pred_posi is None or self.noise_pred_nega is None:
            return None
        return float(torch.linalg.vector_norm(self.noise_pred_posi.float() - self.noise_pred_nega.float()))


class ReportStart(PipelineUnit):
    """Last unit of a full run: hands out the initial latents and the conditioning."""

    def __init__(self, on_start: StartCallback):
        super().__init__(take_over=True)
        self.on_start = on_start

    def process(self, pipe: WanVideoPipeline, inputs_shared: dict, inputs_posi: dict, inputs_nega: dict):
        """Report; the inputs go on unchanged."""
        guided, latents = inputs_shared["cfg_scale"] != 1, inputs_shared["latents"]
        made = {name: inputs_shared.get(name) for name in IDENTITY_NAMES}
        conditioning = Conditioning(
            identity={name: tensor.to(latents.dtype) for name, tensor in made.items() if tensor is not None},
            context_posi=inputs_posi["context"],
            context_nega=inputs_nega["context"] if guided else None,
        )
        pipe.scheduler.first_frame_latents = conditioning.identity.get(FUSED)
        self.on_start(latents, conditioning)
        return inputs_shared, inputs_posi, inputs_nega


class ReplaceStart(PipelineUnit):
    """Last unit of a resumed run: puts the prior's latents and conditioning in place."""

    def __init__(self, latents: torch.Tensor, conditioning: Conditioning):
        super().__init__(take_over=True)
        self.latents = latents
        self.conditioning = conditioning

    def process(self, pipe: WanVideoPipeline, inputs_shared: dict, inputs_posi: dict, inputs_nega: dict):
        """Replace; tensors move to the pipeline's device, their dtype stays."""
        conditioning = self.conditioning.to(pipe.device)
        inputs_shared["latents"] = self.latents.to(pipe.device)
        inputs_shared.update(conditioning.identity)
        if FUSED in conditioning.identity:
            inputs_shared["fuse_vae_embedding_in_latents"] = True
        pipe.scheduler.first_frame_latents = conditioning.identity.get(FUSED)
        inputs_posi["context"] = conditioning.context_posi
        if conditioning.context_nega is not None:
            inputs_nega["context"] = conditioning.context_nega
        return inputs_shared, inputs_posi, inputs_nega


class CheckExperts(PipelineUnit):
    """A unit that refuses steps whose expert is not loaded: the pipeline would take the other one."""

    def __init__(self, boundary: float | None):
        super().__init__(take_over=True)
        self.boundary = boundary

    def process(self, pipe: WanVideoPipeline, inputs_shared: dict, inputs_posi: dict, inputs_nega: dict):
        """Check; the inputs go on unchanged.

        Raises:
            InputError: naming the expert.
        """
        for timestep in pipe.scheduler.timesteps_to_run if self.boundary is not None else ():
            name = expert_of(timestep, self.boundary)
            if getattr(pipe, name) is None:
                kind = "high" if name == "dit" else "low"
                raise InputError(
                    f"timestep {timestep:.0f} needs the {kind}-noise expert, pipe.{name}, and it "
                    "isn't loaded; load it, or leave out its steps"
                )
        return inputs_shared, inputs_posi, inputs_nega


@contextlib.contextmanager
def hooked(pipe: WanVideoPipeline, **attributes: Any) -> Iterator[None]:
    """Give the pipeline other attributes (scheduler, units, model_fn) for the length of a `with`."""
    before = {name: getattr(pipe, name) for name in attributes}
    for name, value in attributes.items():
        setattr(pipe, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(pipe, name, value)
