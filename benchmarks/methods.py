"""The ways to make a new prompt's clip that promise.py compares, and what they all start from.

Each runs through DiffSynth's own pipeline, except FlowEdit, which needs velocities at two places a step and
calls the pipeline's model_fn itself.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "tiny_wan_i2v")]

import world

STEPS = 10
PRIOR_PROMPTS = {kind: kind for kind in ("empty", "scene", "mean", "still")} | {"motion": "old"}  # -> context
RESUMED = {"motion": (3, 5, 6, 7, 8), "empty": (5, 6, 7, 8), "scene": (6,), "mean": (6,), "still": (3, 6)}
SIGMAS = ((0, 3, 5, 7, 8, 9), (0, 3, 6, 8, 9), (0, 3, 6, 8), (0, 4, 7, 9), (0, 5, 8), (0, 6, 9), (0, 7))
DEFAULTS = ((0, 4, 7, 9), (0, 5, 8), (1, 7), (1,))  # what infer_from_prior.py runs of ten steps
DIFFERENTIAL = {
    "motion": DEFAULTS,
    "empty": (*DEFAULTS, (2, 6, 9)),
    "scene": ((0, 5, 8),),
    "still": (
        *((0, 3, 5, 7, 8, 9), (0, 3, 6, 8, 9), *DEFAULTS),
        *((0, 3, 6, 8), (0, 4, 8), (0, 6, 9), (2, 5, 8), (0, 7), (2, 7), (2, 8), (0,)),
    ),
}
WHOLE_BEND = {"motion": ((0, 5, 8),), "empty": ((0, 5, 8),), "still": ((0, 4, 7, 9), (0, 5, 8), (1, 7), (1,))}
BY_BENDS = {"motion": (3,), "still": (4, 3, 2)}  # numbers of steps


@dataclass
class Case:
    """One identity with two motions; what every method starts from. Tensors as in step_skip.pipeline."""

    index: int
    seed: int
    pipe: object
    settings: object  # prior_utils.RunSettings of the full run
    identity: world.Identity
    old_motion: str
    new_motion: str
    contexts: dict[str, object]  # old, new, empty, scene, still, mean
    image: dict[str, object]  # y, clip_feature
    noise: object

    def conditioning(self, posi: str, nega: str = "empty"):
        """The conditioning of one prompt against another."""
        from step_skip.pipeline import Conditioning

        contexts = {"context_posi": self.contexts[posi], "context_nega": self.contexts[nega]}
        return Conditioning(identity=self.image, **contexts)


@dataclass
class Prior:
    """A full run in memory: latents before each step and at the end, guided velocities, the clip."""

    latents: list[object]
    noise_pred: list[object]
    frames: np.ndarray


def run_prior(case: Case, prompt: str):
    """A full run: its steps and its result."""
    from step_skip.pipeline import run_from

    steps = []
    result = run_from(
        case.pipe,
        case.settings,
        start_step=-1,
        latents=case.noise,
        conditioning=case.conditioning(prompt),
        on_step=steps.append,
    )
    return steps, result


def as_prior(steps, result) -> Prior:
    """What generate_prior.py saves of a full run."""
    latents = [steps[0].latents_before, *(step.latents for step in steps)]
    return Prior(latents, [step.noise_pred for step in steps], as_array(result.frames))


def make_prior(case: Case, prompt: str) -> Prior:
    """What generate_prior.py saves."""
    return as_prior(*run_prior(case, prompt))


def as_array(frames) -> np.ndarray:
    """Frames as uint8 [T, H, W, 3]."""
    return np.stack([np.asarray(frame) for frame in frames])


# --- methods: each makes the new prompt's clip, and says what it cost ---------------------------------------


def from_noise(case: Case, prior: Prior | None, *, steps: int):
    """What anyone can do: fewer steps, DiffSynth's own schedule."""
    from step_skip.pipeline import run_from

    settings = replace(case.settings, num_inference_steps=steps)
    conditioning = case.conditioning("new")
    return run_from(case.pipe, settings, start_step=-1, latents=case.noise, conditioning=conditioning)


def from_noise_on(case: Case, prior: Prior | None, *, steps: tuple[int, ...]):
    """Fewer steps on chosen sigmas of the ten-step schedule; the first must be 0."""
    from step_skip.pipeline import run_scheduler
    from step_skip.schedule import ReportingScheduler

    scheduler = ReportingScheduler(lambda _: steps)
    return run_scheduler(
        case.pipe,
        case.settings,
        scheduler=scheduler,
        latents=case.noise,
        conditioning=case.conditioning("new"),
    )


def resume(case: Case, prior: Prior, *, start_step: int, contrast: bool = False):
    """--start_step: the steps after it, new prompt; `contrast`: with the old prompt as the negative one."""
    from step_skip.pipeline import run_from

    return run_from(
        case.pipe,
        case.settings,
        start_step=start_step,
        latents=prior.latents[start_step + 1],
        conditioning=case.conditioning("new", "old" if contrast else "empty"),
    )


def differential(case: Case, prior: Prior, *, steps: tuple[int, ...]):
    """--steps: a few steps along the prior's path, spent on what the new prompt changes."""
    from step_skip.pipeline import run_differential

    path = trajectory(prior, steps)
    return run_differential(case.pipe, case.settings, trajectory=path, conditioning=case.conditioning("new"))


def differential_by_bends(case: Case, prior: Prior, *, num_steps: int):
    """The same at the steps that the prior's own bends choose (bends.py)."""
    from bends import best_steps

    sigmas = [*sigmas_of(case), 0.0]
    steps = best_steps(prior.latents, prior.noise_pred, sigmas)[num_steps - 1]
    return differential(case, prior, steps=tuple(steps))


def whole_bend():
    """The scheduler that follows the prior's bend everywhere: the offset is all that is integrated."""
    from step_skip.schedule import DifferentialScheduler

    class WholeBend(DifferentialScheduler):
        def share_of_bend(self, bend, *, new, old):
            return 1.0

    return WholeBend


def differential_whole_bend(case: Case, prior: Prior, *, steps: tuple[int, ...]):
    """The same, but following the prior's bend everywhere."""
    return along_path(case, trajectory(prior, steps), whole_bend())


def along_path(case: Case, path, scheduler: Callable):
    """Another kind of DifferentialScheduler, made of the prior's path."""
    from step_skip.pipeline import run_scheduler

    start = {"latents": path.latents[0], "conditioning": case.conditioning("new")}
    return run_scheduler(case.pipe, case.settings, scheduler=scheduler(path), **start)


def trajectory(prior: Prior, steps: tuple[int, ...], noise_pred: list[object] | None = None):
    """The prior's path at these steps, with its own velocities or others."""
    from step_skip.schedule import Trajectory

    own = [prior.noise_pred[step] for step in steps]
    return Trajectory(steps, [*(prior.latents[step] for step in steps), prior.latents[-1]], noise_pred or own)


def differential_second_order(case: Case, prior: Prior, *, steps: tuple[int, ...]):
    """The same with Adams-Bashforth steps of second order for the offset, from the second one on."""
    from step_skip.schedule import DifferentialScheduler

    class SecondOrder(DifferentialScheduler):
        before = None  # the step's sigma and difference before this one

        def advance(self, place, model_output, timestep, sample):
            here, there = self.sigmas[place].item(), [*self.sigmas.tolist(), 0.0][place + 1]
            difference = model_output.float() - self.trajectory.noise_pred[place].float()
            change = 0.0  # of the difference, per sigma
            if self.before is not None:
                change = (difference - self.before[1]) / (here - self.before[0])
            self.before = (here, difference)
            self.offset = self.offset + (there - here) * difference + (there - here) ** 2 / 2 * change
            return self.trajectory.latents[place + 1] + self.offset

    return along_path(case, trajectory(prior, steps), SecondOrder)


def differential_without_guidance(case: Case, prior: Prior, *, steps: tuple[int, ...], prompt: str):
    """The difference of the conditional branches alone: half the forwards a step, twice the steps.

    `prompt` is the prior's. Its conditional velocity is computed here, uncounted; a prior would keep it.
    """
    sigmas = sigmas_of(case)
    posi = [velocity(case, prior.latents[step], sigmas[step], prompt, cfg_scale=1) for step in steps]
    unguided = replace(case, settings=replace(case.settings, cfg_scale=1.0))
    return along_path(unguided, trajectory(prior, steps, posi), whole_bend())


def renoise(case: Case, prior: Prior, *, start_step: int, steps: tuple[int, ...]):
    """The prior's clean latents noised again with other noise up to a step's sigma, then these steps."""
    import torch

    from step_skip.pipeline import run_scheduler
    from step_skip.schedule import ReportingScheduler

    sigma = sigmas_of(case)[start_step]
    noise = torch.randn(case.noise.shape, generator=torch.Generator().manual_seed(case.seed + 500_000))
    return run_scheduler(
        case.pipe,
        case.settings,
        scheduler=ReportingScheduler(lambda _: steps),
        latents=(1 - sigma) * prior.latents[-1] + sigma * noise,
        conditioning=case.conditioning("new"),
    )


def video_to_video(case: Case, prior: Prior, *, steps: int, strength: float):
    """What SDEdit users do: noise the prior's finished clip again and denoise it with the new prompt."""
    import torch

    from step_skip.pipeline import run_from
    from step_skip.schedule import compute_schedule

    settings = replace(case.settings, num_inference_steps=steps, denoising_strength=strength)
    schedule = {"num_inference_steps": steps, "denoising_strength": strength}
    sigma = compute_schedule(**schedule, sigma_shift=settings.sigma_shift)[1][0]
    video = torch.from_numpy(prior.frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        clean = case.pipe.vae.encode(video, device=case.pipe.device)
    latents = (1 - sigma) * clean + sigma * case.noise
    return run_from(
        case.pipe, settings, start_step=-1, latents=latents, conditioning=case.conditioning("new")
    )


def flow_edit(case: Case, prior: Prior, *, steps: tuple[int, ...]):
    """FlowEdit (arXiv 2412.08629, algorithm 1, n_avg 1): both velocities anew from the clip's noised latents.

    Costs twice the forwards of the others per step, for it doesn't have the old prompt's velocity on disk.
    """
    import torch

    from step_skip.pipeline import decode
    from step_skip.results import RunResult

    sigmas = sigmas_of(case)
    chosen = [*(sigmas[step] for step in steps), 0.0]
    source = prior.latents[-1]
    edited = source.clone()
    for sigma, sigma_next in zip(chosen, chosen[1:], strict=False):
        noised = (1 - sigma) * source + sigma * case.noise
        target = edited + noised - source
        difference = velocity(case, target, sigma, "new") - velocity(case, noised, sigma, "old")
        edited = edited + (sigma_next - sigma) * difference
    with torch.no_grad():
        frames = decode(case.pipe, edited, tiled=case.settings.tiled)
    return RunResult(frames, edited, list(steps), 4 * len(steps))


def sigmas_of(case: Case) -> list[float]:
    """The noise levels that the steps of the full run start at."""
    from step_skip.schedule import compute_schedule

    names = ("num_inference_steps", "denoising_strength", "sigma_shift")
    return compute_schedule(**{name: getattr(case.settings, name) for name in names})[1]


def velocity(case: Case, latents, sigma: float, prompt: str, *, cfg_scale: float | None = None):
    """The guided velocity at any latents and noise level."""
    import torch

    conditioning = case.conditioning(prompt)
    models = {"dit": case.pipe.dit, **conditioning.identity}
    timestep = torch.tensor([1000 * sigma], dtype=case.pipe.torch_dtype)
    with torch.no_grad():
        posi, nega = (
            case.pipe.model_fn(**models, latents=latents, timestep=timestep, context=context)
            for context in (conditioning.context_posi, conditioning.context_nega)
        )
    return nega + (cfg_scale or case.settings.cfg_scale) * (posi - nega)


@dataclass(frozen=True)
class Method:
    """A way to make the clip: its name in the table, the prior it starts from, how it runs.

    steps: what the table says of the steps where they differ from clip to clip.
    """

    name: str
    run: Callable
    prior: str = "none"
    steps: str = ""


def methods() -> Iterator[Method]:
    """Everything on the chart, the full run first."""
    bind = functools.partial
    yield Method("full run", bind(from_noise, steps=STEPS))
    for steps in (6, 4, 3, 2, 1):
        yield Method("fewer steps", bind(from_noise, steps=steps))
    for steps in SIGMAS:
        yield Method("fewer steps, chosen sigmas", bind(from_noise_on, steps=steps))
    for kind, start_steps in RESUMED.items():
        for start_step in start_steps:
            yield Method("resume", bind(resume, start_step=start_step), kind)
    yield Method("resume, old prompt as negative", bind(resume, start_step=6, contrast=True), "motion")
    for kind, choices in DIFFERENTIAL.items():
        for steps in choices:
            yield Method("differential", bind(differential, steps=steps), kind)
    for kind, numbers in BY_BENDS.items():
        for number in numbers:
            run = bind(differential_by_bends, num_steps=number)
            yield Method("differential, steps by its bends", run, kind, f"{number} steps")
    for kind, choices in WHOLE_BEND.items():
        for steps in choices:
            yield Method("differential, whole bend", bind(differential_whole_bend, steps=steps), kind)
    for steps in ((0, 4, 8), (0, 5, 8)):
        yield Method("differential, second order", bind(differential_second_order, steps=steps), "empty")
    for kind in ("empty", "motion"):
        run = bind(differential_without_guidance, steps=(0, 2, 4, 6, 7, 8), prompt=PRIOR_PROMPTS[kind])
        yield Method("differential, no guidance", run, kind)
    for steps in ((0, 5, 8), (2, 5, 8)):
        yield Method("noised again", bind(renoise, start_step=steps[0], steps=steps), "empty")
    for strength in (0.9, 0.7):
        yield Method(f"video to video {strength}", bind(video_to_video, steps=3, strength=strength), "motion")
    yield Method("FlowEdit", bind(flow_edit, steps=(0, 6)), "motion")
