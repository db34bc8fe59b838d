"""What makes steps cheaper without changing which of them run: guidance by step, TeaCache, and the count.

`wan_pipeline` puts these around one call of the pipeline; skip_cache.py is the fourth of them.
Checked against diffsynth 2.1.12, diffsynth/pipelines/wan_video.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffsynth.diffusion.base_pipeline import PipelineUnit
from diffsynth.pipelines.wan_video import TeaCache

from prior_utils import InputError

if TYPE_CHECKING:
    from diffsynth.pipelines.wan_video import WanVideoPipeline

# A cfg_scale that keeps both branches' inputs and makes nega + cfg_scale * (posi - nega) what the second
# call returns: so the pipeline leaves the guidance to the model_fn.
LEFT_TO_MODEL_FN = 0.0


class GuidanceByStep:
    """A model_fn that guides each step by its own scale; a scale of 1 needs no negative branch.

    The pipeline, called with cfg_scale LEFT_TO_MODEL_FN, asks for the positive branch, then for the negative
    one; the answer to the second is the guided velocity, by the pipeline's own formula.
    """

    def __init__(self, model_fn: Callable[..., torch.Tensor], cfg_scales: Sequence[float]):
        self.model_fn = model_fn
        self.remaining = iter(cfg_scales)

    def __call__(self, *, positive: bool, **kwargs: Any) -> torch.Tensor:
        if positive:
            self.noise_pred_posi = self.model_fn(positive=True, **kwargs)
            return self.noise_pred_posi
        cfg_scale = next(self.remaining)
        if cfg_scale == 1:
            return self.noise_pred_posi
        noise_pred_nega = self.model_fn(positive=False, **kwargs)
        return noise_pred_nega + cfg_scale * (self.noise_pred_posi - noise_pred_nega)


class TellTeaCache(PipelineUnit):
    """First unit of a run with TeaCache: tells it how often each branch is really evaluated.

    DiffSynth's TeaCache computes the first and the last evaluation in full, and takes num_inference_steps
    for their number.

    Args:
        guided_steps: evaluations of the negative branch; None: as many as steps run.
    """

    def __init__(self, guided_steps: int | None):
        super().__init__(take_over=True)
        self.guided_steps = guided_steps

    def process(self, pipe: WanVideoPipeline, inputs_shared: dict, inputs_posi: dict, inputs_nega: dict):
        """Replace num_inference_steps in both branches."""
        steps = len(pipe.scheduler.timesteps)
        inputs_posi["num_inference_steps"] = steps
        inputs_nega["num_inference_steps"] = steps if self.guided_steps is None else self.guided_steps
        return inputs_shared, inputs_posi, inputs_nega


def check_tea_cache_model_id(model_id: str) -> None:
    """Refuse a model that DiffSynth's TeaCache has no coefficients for.

    Raises:
        InputError: naming those it has.
    """
    known = TeaCache(1, 1.0, "Wan2.1-I2V-14B-480P").coefficients_dict
    if model_id not in known:
        raise InputError(
            f"--tea_cache_l1_thresh: DiffSynth's TeaCache has no coefficients for {model_id}; use "
            f"--skip_cache, or those of another model with --tea_cache_model_id: {', '.join(known)}"
        )


class BlockCounter:
    """Counts the transformer blocks that a run evaluates."""

    def __init__(self):
        self.evaluations = 0

    @contextlib.contextmanager
    def counting(self, pipe: WanVideoPipeline) -> Iterator[None]:
        """Count for the length of a `with`, by a hook on each block."""
        dits = [dit for dit in (pipe.dit, pipe.dit2) if dit is not None]
        handles = [block.register_forward_pre_hook(self._count) for dit in dits for block in dit.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, *_: Any) -> None:
        self.evaluations += 1
