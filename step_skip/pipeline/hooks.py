"""Observe and replace values within one call of WanVideoPipeline, by units and a model_fn (`hooked`).

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
    """A model_fn that counts the network evaluations of a run and stores both branches of the current step.

    WanVideoPipeline calls it with positive=True and then, unless cfg_scale is 1, with positive=False.

    Args:
        known_nega: the negative branch of the first step, [B, C, T, H, W], which is then not evaluated; None:
            unknown.
    """

    def __init__(self, model_fn: Callable[..., torch.Tensor], *, known_nega: torch.Tensor | None = None):
        self.model_fn = model_fn
        self.known_nega = known_nega
        self.forwards = 0
        self.noise_pred_posi: torch.Tensor | None = None
        self.noise_pred_nega: torch.Tensor | None = None  # None until it is evaluated

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
        """Evaluate the network once; a first frame that is fused into the latents gets the velocity 0."""
        self.forwards += 1
        noise_pred = self.model_fn(**kwargs)
        if not kwargs.get("fuse_vae_embedding_in_latents"):
            return noise_pred
        return torch.cat([torch.zeros_like(noise_pred[:, :, :1]), noise_pred[:, :, 1:]], 2)

    @property
    def branch_distance(self) -> float | None:
        """Return the norm of the branches' difference; None if there is only one branch."""
        if self.noise_pred_posi is None or self.noise_pred_nega is None:
            return None
        return float(torch.linalg.vector_norm(self.noise_pred_posi.float() - self.noise_pred_nega.float()))


class ReportStart(PipelineUnit):
    """The last unit of a full run, which reports the initial latents and the conditioning to a callback."""

    def __init__(self, on_start: StartCallback):
        super().__init__(take_over=True)
        self.on_start = on_start

    def process(self, pipe: WanVideoPipeline, inputs_shared: dict, inputs_posi: dict, inputs_nega: dict):
        """Report, and return the inputs unchanged."""
        guided, latents = inputs_shared["cfg_scale"] != 1, inputs_shared["latents"]
        found = {name: inputs_shared.get(name) for name in IDENTITY_NAMES}
        conditioning = Conditioning(
            identity={name: tensor.to(latents.dtype) for name, tensor in found.items() if tensor is not None},
            context_posi=inputs_posi["context"],
            context_nega=inputs_nega["context"] if guided else None,
        )
        pipe.scheduler.first_frame_latents = conditioning.identity.get(FUSED)
        self.on_start(latents, conditioning)
        return inputs_shared, inputs_posi, inputs_nega


class ReplaceStart(PipelineUnit):
    """The last unit of a resumed run, which replaces latents and conditioning by the prior's."""

    def __init__(self, latents: torch.Tensor, conditioning: Conditioning):
        super().__init__(take_over=True)
        self.latents = latents
        self.conditioning = conditioning

    def process(self, pipe: WanVideoPipeline, inputs_shared: dict, inputs_posi: dict, inputs_nega: dict):
        """Replace the inputs; tensors are moved to the pipeline's device and keep their dtype."""
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
    """A unit that rejects steps whose expert is not loaded, for which the pipeline would use the other one.

    Args:
        boundary: switch_DiT_boundary, 0 ... 1; None: there is only one network.
    """

    def __init__(self, boundary: float | None):
        super().__init__(take_over=True)
        self.boundary = boundary

    def process(self, pipe: WanVideoPipeline, inputs_shared: dict, inputs_posi: dict, inputs_nega: dict):
        """Check, and return the inputs unchanged.

        Raises:
            InputError: an expert is not loaded; the message names it.
        """
        for timestep in pipe.scheduler.timesteps_to_run if self.boundary is not None else ():
            name = expert_of(timestep, self.boundary)
            if getattr(pipe, name) is None:
                kind = "high" if name == "dit" else "low"
                raise InputError(
                    f"timestep {timestep:.0f} needs the {kind}-noise expert, pipe.{name}, which "
                    "isn't loaded; load it, or leave out its steps"
                )
        return inputs_shared, inputs_posi, inputs_nega


@contextlib.contextmanager
def hooked(pipe: WanVideoPipeline, **attributes: Any) -> Iterator[None]:
    """Replace attributes of the pipeline (scheduler, units, model_fn) within a `with`."""
    before = {name: getattr(pipe, name) for name in attributes}
    for name, value in attributes.items():
        setattr(pipe, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(pipe, name, value)
