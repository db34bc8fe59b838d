"""The ways to make a new prompt's clip that promise.py compares, and what all of them start from.

Each runs through DiffSynth's own pipeline, except FlowEdit, which needs velocities at two places a step and
calls the pipeline's model_fn itself.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "tiny_wan_i2v")]

import world

STEPS = 50  # of the run everything is compared with, and of the priors unless it is said


@dataclass
class Case:
    """One identity with two motions; what every method starts from. Tensors as in step_skip.pipeline."""

    index: int
    seed: int
    pipe: object
    settings: object  # step_skip.prior.RunSettings of the full run
    identity: world.Identity
    old_motion: str
    new_motion: str
    contexts: dict[str, object]  # old, new, empty, still
    image: dict[str, object]  # y, clip_feature
    noise: object

    def conditioning(self, posi: str, nega: str = "empty"):
        """The conditioning of one prompt against another."""
        from step_skip.pipeline.conditioning import Conditioning

        contexts = {"context_posi": self.contexts[posi], "context_nega": self.contexts[nega]}
        return Conditioning(identity=self.image, **contexts)


@dataclass
class Prior:
    """A full run in memory, as generate_prior.py saves it."""

    settings: object
    latents: list[object]  # before each step, and the clean ones
    noise_pred: list[object]
    noise_pred_nega: list[object]  # and branch_distances: of None without guidance
    branch_distances: list[float]
    frames: np.ndarray
    kept_steps: list[int] | None = None  # of a clip's: those it took; of the others there is None

    @property
    def sigmas(self) -> list[float]:
        """The noise levels that its steps start at."""
        return sigmas_of(self.settings)

    @property
    def is_guided(self) -> bool:
        """Whether both branches of its guidance are known."""
        return self.settings.cfg_scale != 1


def make_prior(case: Case, prompt: str, steps: int) -> Prior:
    """What generate_prior.py saves."""
    from step_skip.pipeline.run import run_from

    taken = []
    settings = replace(case.settings, num_inference_steps=steps)
    start = {"start_step": -1, "latents": case.noise, "conditioning": case.conditioning(prompt)}
    result = run_from(case.pipe, settings, on_step=taken.append, **start)
    return Prior(
        settings,
        [taken[0].latents_before, *(step.latents for step in taken)],
        [step.noise_pred for step in taken],
        [step.noise_pred_nega for step in taken],
        [step.branch_distance for step in taken],
        as_array(result.frames),
    )


PRIORS: dict[str, Callable[[Case], Prior]] = {  # that methods start from: whose context, how many steps
    "still": functools.partial(make_prior, prompt="still", steps=STEPS),
    "motion": functools.partial(make_prior, prompt="old", steps=STEPS),
    "still 10": functools.partial(make_prior, prompt="still", steps=10),
    "motion 10": functools.partial(make_prior, prompt="old", steps=10),
}


def on_schedule_of(prior: Prior, case: Case):
    """The case's settings with the prior's number of steps."""
    return replace(case.settings, num_inference_steps=prior.settings.num_inference_steps)


def known_nega(case: Case, prior: Prior, step: int):
    """The first negative branch of a run that begins at a prior's step, as infer_from_prior.py knows it."""
    reads = prior.is_guided and case.settings.cfg_scale != 1 and case.settings.skip_cache is None
    return prior.noise_pred_nega[step] if reads else None


def as_array(frames) -> np.ndarray:
    """Frames as uint8 [T, H, W, 3]."""
    return np.stack([np.asarray(frame) for frame in frames])


# --- methods: each makes the new prompt's clip, and says what it cost ---------------------------------------


def from_noise(case: Case, prior: Prior | None, *, steps: int):
    """What anyone can do: fewer steps, DiffSynth's own schedule and Euler."""
    from step_skip.pipeline.run import run_from

    settings = replace(case.settings, num_inference_steps=steps)
    conditioning = case.conditioning("new")
    return run_from(case.pipe, settings, start_step=-1, latents=case.noise, conditioning=conditioning)


def from_noise_on(case: Case, prior: Prior, *, steps: int):
    """As many steps of Euler's on the sigmas where a differential resume's steps lie."""
    from step_skip.pipeline.run import run_on_sigmas

    start = {"latents": case.noise, "conditioning": case.conditioning("new")}
    return run_on_sigmas(case.pipe, case.settings, sigmas=chosen_sigmas(case, steps), **start)


def with_solver(case: Case, prior: Prior, *, steps: int, solver: str, chosen: bool):
    """A good solver of diffusers', from noise, on DiffSynth's schedule or on our sigmas.

    The negative branch at the noise is the prior's: it is given to them for nothing, as it is to us.
    """
    from step_skip.pipeline.run import run_scheduler

    own = sigmas_of(replace(case.settings, num_inference_steps=steps))
    sigmas = chosen_sigmas(case, steps) if chosen else own
    return run_scheduler(
        case.pipe,
        case.settings,
        scheduler=solver_scheduler(solver, sigmas),
        latents=case.noise,
        conditioning=case.conditioning("new"),
        known_nega=prior.noise_pred_nega[0],
    )


def solver_scheduler(solver: str, sigmas: list[float]):
    """A scheduler of ours whose steps are taken by diffusers' solver."""
    import diffusers
    import torch

    from step_skip.pipeline.schedulers import SigmasScheduler

    kinds = {"DPM++ 2M": diffusers.DPMSolverMultistepScheduler, "UniPC": diffusers.UniPCMultistepScheduler}
    theirs = kinds[solver](prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    theirs.set_timesteps(len(sigmas))
    begin = min(sigmas[0], 1 - 1e-6)  # as their own set_timesteps: the logarithm of 0 is not taken
    theirs.sigmas = torch.tensor([begin, *sigmas[1:], 0.0])
    theirs.timesteps = 1000 * theirs.sigmas[:-1]
    theirs.set_begin_index(0)

    class Solver(SigmasScheduler):
        def advance(self, place, model_output, timestep, sample):
            return theirs.step(model_output, theirs.timesteps[place], sample, return_dict=False)[0]

    return Solver(sigmas)


def resume(case: Case, prior: Prior, *, start_step: int):
    """--start_step: the steps after it, new prompt: the original recipe."""
    from step_skip.pipeline.run import run_from

    return run_from(
        case.pipe,
        on_schedule_of(prior, case),
        start_step=start_step,
        latents=prior.latents[start_step + 1],
        conditioning=case.conditioning("new"),
        known_nega=known_nega(case, prior, start_step + 1),
    )


def differential(case: Case, prior: Prior, *, steps: int, fading: bool = True, on_step=None, **parts):
    """--num_steps: a few steps along the prior's path, spent on what the new prompt changes.

    Args:
        fading: let guidance fade over a step as it did for the prior.
        on_step: called with each step.
        parts: other functions in place of those of `method.differential.follow`.
    """
    from step_skip.pipeline.run import run_scheduler
    from step_skip.pipeline.schedulers import DifferentialScheduler

    path = trajectory(prior, steps)
    if not fading:
        path = replace(path, guidance_decay=None)
    return run_scheduler(
        case.pipe,
        on_schedule_of(prior, case),
        scheduler=DifferentialScheduler(path, case.settings.cfg_scale, **parts),
        latents=path.latents[0],
        conditioning=case.conditioning("new"),
        known_nega=known_nega(case, prior, path.steps[0]),
        on_step=on_step,
    )


def differential_straight(case: Case, prior: Prior, *, steps: int):
    """Run the same without the guess from the step before."""
    return differential(
        case, prior, steps=steps, extrapolate=lambda change, residual, *_: (change, residual, [])
    )


def differential_uncorrected(case: Case, prior: Prior, *, steps: int):
    """Run the same without correcting the offset by the step before."""
    return differential(case, prior, steps=steps, correct=lambda offset, *_, **__: offset)


def differential_fading_alike(case: Case, prior: Prior, *, steps: int):
    """Run the same where guidance fades for every change as it did for the prior."""
    return differential(case, prior, steps=steps, rate_of=lambda new, old: 1.0)


def differential_own_bend(case: Case, prior: Prior, *, steps: int):
    """Run the same without the prior's residual: only what is guessed."""

    def only_where_alike(residual, denoised, denoised_before, *, per_position):
        new, old = denoised
        return (new == old).all(1, keepdim=True).float()

    return differential(case, prior, steps=steps, share_of=only_where_alike)


def trajectory(prior: Prior, num_steps: int):
    """The prior's path at as many steps as --num_steps would choose."""
    from step_skip.method.differential import Trajectory
    from step_skip.method.steps import guidance_decay, nearest_steps, spread_steps

    steps, guidance = spread_steps(len(prior.noise_pred), num_steps), {}
    if prior.kept_steps is not None:
        steps = nearest_steps(steps, prior.kept_steps)
    if prior.is_guided:
        guidance = {
            "noise_pred_nega": [prior.noise_pred_nega[step] for step in steps],
            "cfg_scale": prior.settings.cfg_scale,
            "guidance_decay": guidance_decay(prior.branch_distances, steps, sigmas=prior.sigmas),
        }
    latents = [*(prior.latents[step] for step in steps), prior.latents[-1]]
    return Trajectory(steps, latents, [prior.noise_pred[step] for step in steps], **guidance)


def video_to_video(case: Case, prior: Prior, *, steps: int, strength: float):
    """What SDEdit users do: noise the prior's finished clip again and denoise it with the new prompt."""
    import torch

    from step_skip.pipeline.run import run_from

    settings = replace(case.settings, num_inference_steps=steps, denoising_strength=strength)
    sigma = sigmas_of(settings)[0]
    video = torch.from_numpy(prior.frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        clean = case.pipe.vae.encode(video, device=case.pipe.device)
    latents = (1 - sigma) * clean + sigma * case.noise
    return run_from(
        case.pipe, settings, start_step=-1, latents=latents, conditioning=case.conditioning("new")
    )


def flow_edit(case: Case, prior: Prior, *, steps: int):
    """FlowEdit (arXiv 2412.08629, algorithm 1, n_avg 1): both velocities anew from the clip's noised latents.

    Costs twice the forwards of the others per step, for it doesn't have the old prompt's velocity on disk.
    """
    import torch

    from step_skip.pipeline.results import RunResult
    from step_skip.pipeline.run import decode

    sigmas = [*chosen_sigmas(case, steps), 0.0]
    source = prior.latents[-1]
    edited = source.clone()
    for sigma, sigma_next in itertools.pairwise(sigmas):
        noised = (1 - sigma) * source + sigma * case.noise
        target = edited + noised - source
        difference = velocity(case, target, sigma, "new") - velocity(case, noised, sigma, "old")
        edited = edited + (sigma_next - sigma) * difference
    with torch.no_grad():
        frames = decode(case.pipe, edited, tiled=case.settings.tiled)
    return RunResult(frames, edited, list(range(steps)), 4 * steps)


def sigmas_of(settings) -> list[float]:
    """The noise levels that the steps of these settings start at."""
    from step_skip.pipeline.schedulers import compute_schedule

    names = ("num_inference_steps", "denoising_strength", "sigma_shift")
    return compute_schedule(**{name: getattr(settings, name) for name in names})[1]


def chosen_sigmas(case: Case, num_steps: int) -> list[float]:
    """Where so many steps of a differential resume lie, from a prior of as many steps as the full run."""
    from step_skip.method.steps import spread_steps

    sigmas = sigmas_of(case.settings)
    return [sigmas[step] for step in spread_steps(len(sigmas), num_steps)]


def velocity(case: Case, latents, sigma: float, prompt: str):
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
    return nega + case.settings.cfg_scale * (posi - nega)


@dataclass(frozen=True)
class Method:
    """A way to make the clip: its name in the table, the prior it starts from, how it runs."""

    name: str
    run: Callable
    prior: str = "none"


def methods() -> Iterator[Method]:
    """Everything that is compared, the full run first."""
    bind = functools.partial
    for steps in (STEPS, 10, 4, 3):
        yield Method(f"Euler, {steps} steps", bind(from_noise, steps=steps))
    yield Method("Euler, 4 steps on our sigmas", bind(from_noise_on, steps=4))
    for solver, numbers in (("DPM++ 2M", (3, 4, 6)), ("UniPC", (4,))):
        for steps in numbers:
            for chosen in (False, True):
                name = f"{solver}, {steps} steps" + (" on our sigmas" if chosen else "")
                yield Method(name, bind(with_solver, steps=steps, solver=solver, chosen=chosen), "still")
    yield Method("the original recipe: resume after 6 of 10", bind(resume, start_step=6), "motion 10")
    yield Method("video to video 0.9, 3 steps", bind(video_to_video, steps=3, strength=0.9), "motion 10")
    yield Method("FlowEdit, 2 steps", bind(flow_edit, steps=2), "motion 10")
    for kind, numbers in (("still", (1, 2, 3, 4, 6)), ("motion", (2, 3, 4, 6)), ("still 10", (3, 4))):
        for steps in numbers:
            yield Method(f"differential, {steps} steps", bind(differential, steps=steps), kind)
    for name, run in (
        ("guidance doesn't fade", bind(differential, fading=False)),
        ("guidance fades as the prior's", differential_fading_alike),
        ("no guess from the step before", differential_straight),
        ("the step before not corrected", differential_uncorrected),
        ("no share of the rest", differential_own_bend),
    ):
        yield Method(f"differential, 4 steps, {name}", bind(run, steps=4), "still")
