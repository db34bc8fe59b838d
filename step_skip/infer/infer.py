"""Make one clip from a prior on a loaded pipeline: the Python function."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from step_skip.infer.bank import check_one_bank, plan_clip
from step_skip.infer.choices import choices_on
from step_skip.infer.clip import Clip, make_clip
from step_skip.infer.inputs import Source, encode_new, load_inputs
from step_skip.infer.warnings import warn_before_run
from step_skip.models.loading import Model, model_of
from step_skip.prior.checks import check_model
from step_skip.prior.contexts import ContextStore
from step_skip.prior.metadata import read_prior
from step_skip.prior.prior import Prior

if TYPE_CHECKING:
    from diffsynth.pipelines.wan_video import WanVideoPipeline
    from PIL.Image import Image

    from step_skip.pipeline.schedulers import ProgressCallback


def infer_from_prior(
    pipe: WanVideoPipeline | Model,
    prior: Prior | str | Path | Sequence[Prior | str | Path],
    prompt: str | None = None,
    *,
    negative_prompt: str | None = None,
    cfg_scale: float | Sequence[float] | None = None,
    cfg_scale_2: float | None = None,
    steps: Sequence[int] | None = None,
    num_steps: int | Literal["auto"] | None = None,
    closeness: float | None = None,
    start_step: int | Literal["auto"] | None = None,
    num_steps_after: int | None = None,
    text_share: float | None = None,
    sigmas: Sequence[float] | None = None,
    skip_cache: int | None = None,
    tea_cache_l1_thresh: float | None = None,
    tea_cache_model_id: str | None = None,
    tiled: bool | Literal["auto"] | None = None,
    fps: float | None = None,
    image: str | Path | Image | None = None,
    callback_on_step_end: ProgressCallback | None = None,
    progress: bool = True,
) -> Clip:
    """Make a video of a prior's identity in a few of its steps. Nothing is written but kept contexts.

    Args:
        pipe: any WanVideoPipeline, or what `load` gives; it is left as it was found.
        prior: what `generate_prior` returned, or its folder; of several that begin alike the nearest.
        prompt: the new motion; None: the prior's own prompt, which gives the prior's own video, bit for bit.
        negative_prompt, cfg_scale: None: the prior's; cfg_scale may have one value for each step that runs.
        cfg_scale_2: of two experts the low-noise one's.
        steps, num_steps: a differential resume at these steps, or at so many; the default is 3 of 10.
        closeness: with num_steps "auto": to a full run, in dB; as few steps as are expected to reach it.
        start_step: a resume after this step instead, or "auto" (with text_share, 0 ... 1).
        num_steps_after: with start_step: in so many steps to the end.
        sigmas: a schedule of its own instead (1 is noise), begun on the prior's path.
        skip_cache, tea_cache_l1_thresh, tea_cache_model_id: cheaper steps.
        tiled: False decodes whole frames, True in tiles, "auto" by sizes; None: as the prior's own video was.
        image: only a prior of the pull request's scripts needs it.
        callback_on_step_end: called after each step with (step, steps, denoised).
        progress: show progress bars.

    Raises:
        InputError: a prior that is damaged or doesn't fit, or choices that contradict it.
        RunError: latents became NaN or infinite.
    """
    model = model_of(pipe)
    given = [prior] if isinstance(prior, Prior | str | Path) else prior
    bank = [each if isinstance(each, Prior) else read_prior(Path(each)) for each in given]
    check_one_bank(bank)
    choices = choices_on(
        model.options,
        prompt=prompt,
        negative_prompt=negative_prompt,
        cfg_scale=cfg_scale,
        cfg_scale_2=cfg_scale_2,
        steps=steps,
        num_steps=num_steps,
        closeness=closeness,
        start_step=start_step,
        num_steps_after=num_steps_after,
        text_share=text_share,
        sigmas=sigmas,
        skip_cache=skip_cache,
        tea_cache_l1_thresh=tea_cache_l1_thresh,
        tea_cache_model_id=tea_cache_model_id,
        fps=fps,
        image=image,
        tiled=tiled,
    )
    plan = plan_clip(choices, bank)
    source = Source.of(bank)
    with contextlib.redirect_stdout(sys.stderr):
        load_inputs(source, [plan])
        check_model(model, source.prior)
        warn_before_run([(plan, source.prior)], model.options)
        begin = time.perf_counter()
        encode_new(source, [plan], model, ContextStore())
        encoded = time.perf_counter() - begin
        clip = make_clip(source, plan, model, callback=callback_on_step_end, progress=progress)
        clip.seconds["encode"] = encoded
        return clip
