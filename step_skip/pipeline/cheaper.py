"""What makes steps cheaper without changing which of them run, and the count of what they cost.

Skip-Cache: every N-th step runs all of a DiT's blocks, the steps between only the first and the last. From
one step to the next the deep blocks add nearly the same. So a full step keeps what the blocks between the
first and the last added, and the steps after it put that in their place (the Skip-Cache of Skip-DiT, arXiv
2411.17616, in its form without training). Each guidance branch keeps its own. A DiT that has a `skip_branch`
(Branch) corrects what is put in by it: the trained form.

    with skip_cache(pipe, every=2, model_fn=pipe.model_fn) as model_fn:
        ...  # steps 0, 2, 4 ... of those that run are full ones

Nothing of DiffSynth's forward is copied: it loops over `dit.blocks`, which for the length of the `with` is
[first, Middle, last]. Guidance by step and TeaCache are put around one call of the pipeline in the same way.
Checked against diffsynth 2.1.12, diffsynth/pipelines/wan_video.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffsynth.diffusion.base_pipeline import PipelineUnit
from diffsynth.pipelines.wan_video import TeaCache

from step_skip.errors import InputError
from step_skip.method.skip_cache import Middle, ModelFn, SkipCacheModelFn

if TYPE_CHECKING:
    from diffsynth.pipelines.wan_video import WanVideoPipeline

# A cfg_scale that keeps both branches' inputs and makes nega + cfg_scale * (posi - nega) what the second
# call returns: so the pipeline leaves the guidance to the model_fn.
LEFT_TO_MODEL_FN = 0.0
MIN_BLOCKS = 3  # with fewer there is nothing between the first and the last


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


@contextlib.contextmanager
def skip_cache(pipe: WanVideoPipeline, *, every: int, model_fn: ModelFn) -> Iterator[ModelFn]:
    """Replace the middle of the pipeline's DiTs for the length of a `with`, and yield the model_fn to use.

    Nothing is kept from one `with` to the next: the first step in it is a full one.

    Args:
        every: 2 or more; one full step in so many of those that run.
        model_fn: the pipeline's, wrapped or not.

    Raises:
        InputError: a DiT has too few blocks.
    """
    dits = [dit for dit in (pipe.dit, pipe.dit2) if dit is not None]
    blocks = {dit: dit.blocks for dit in dits}
    for each in blocks.values():
        if len(each) < MIN_BLOCKS:
            raise InputError(
                f"--skip_cache needs a model of {MIN_BLOCKS} blocks or more, and this one has {len(each)}; "
                "leave it out"
            )
    middles = {
        dit: Middle(each[1:-1], every=every, branch=getattr(dit, "skip_branch", None))
        for dit, each in blocks.items()
    }
    try:
        for dit, each in blocks.items():
            dit.blocks = torch.nn.ModuleList([each[0], middles[dit], each[-1]])
        yield SkipCacheModelFn(model_fn, middles)
    finally:
        for dit, each in blocks.items():
            dit.blocks = each
