"""Make steps cheaper without changing which steps run, and count the transformer blocks that a run evaluates.

Skip-Cache (method/skip_cache.py; Skip-DiT, arXiv 2411.17616): every N-th step runs all of a DiT's blocks, the
steps between only the first and the last. A full step stores the update of the blocks between, and the steps
after it add the stored update, separately for each guidance branch. A DiT that has a `skip_branch` (Branch)
corrects the reused update: the trained form.

    with skip_cache(pipe, every=2, model_fn=pipe.model_fn) as model_fn:
        ...  # steps 0, 2, 4 ... of those that run are full steps

Nothing of DiffSynth's forward is copied: it loops over `dit.blocks`, which is [first, Middle, last] within
the `with`. `GuidanceByStep` and `SetTeaCacheSteps` wrap one call of the pipeline in the same way. Checked
against diffsynth 2.1.12, diffsynth/pipelines/wan_video.py.
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

# A cfg_scale with which the pipeline evaluates both branches and nega + cfg_scale * (posi - nega) equals the
# result of the second call, so that the model_fn computes the guidance.
LEFT_TO_MODEL_FN = 0.0
MIN_BLOCKS = 3  # with fewer there is no block between the first and the last


class GuidanceByStep:
    """A model_fn with one cfg_scale per step; a scale of 1 evaluates no negative branch.

    The pipeline, called with cfg_scale LEFT_TO_MODEL_FN, evaluates the positive branch, then the negative
    one; the second call returns the guided velocity by the pipeline's own formula,
    nega + cfg_scale * (posi - nega).
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


class SetTeaCacheSteps(PipelineUnit):
    """The first unit of a run with TeaCache, which sets the number of evaluations of each branch.

    DiffSynth's TeaCache computes the first and the last evaluation in full, and takes num_inference_steps as
    the number of evaluations.

    Args:
        guided_steps: number of evaluations of the negative branch; None: one for each step that runs.
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
    """Check that DiffSynth's TeaCache has coefficients for a model.

    Raises:
        InputError: it has none; the message lists the models it has coefficients for.
    """
    known = TeaCache(1, 1.0, "Wan2.1-I2V-14B-480P").coefficients_dict
    if model_id not in known:
        raise InputError(
            f"--tea_cache_l1_thresh: DiffSynth's TeaCache has no coefficients for {model_id}; use "
            f"--skip_cache, or those of another model with --tea_cache_model_id: {', '.join(known)}"
        )


class BlockCounter:
    """A counter of the transformer blocks that a run evaluates."""

    def __init__(self):
        self.evaluations = 0

    @contextlib.contextmanager
    def counting(self, pipe: WanVideoPipeline) -> Iterator[None]:
        """Count within a `with`, by a hook on each block."""
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
    """Replace the middle blocks of the pipeline's DiTs within a `with`, and yield the model_fn to use.

    No update is kept from one `with` to the next: its first step is a full one.

    Args:
        every: 2 or more; one step in `every` of those that run is a full step.
        model_fn: the pipeline's, wrapped or not.

    Raises:
        InputError: a DiT has fewer than MIN_BLOCKS blocks.
    """
    dits = [dit for dit in (pipe.dit, pipe.dit2) if dit is not None]
    blocks = {dit: dit.blocks for dit in dits}
    for each in blocks.values():
        if len(each) < MIN_BLOCKS:
            raise InputError(
                f"--skip_cache needs a model of {MIN_BLOCKS} blocks or more, and this one has {len(each)}; "
                "leave --skip_cache out"
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
