"""Measure the promise on the embedded model: is the new prompt obeyed, the identity kept, the time saved?

    python benchmarks/promise.py --identities 100
    python benchmarks/promise.py --report_only

Every case is an identity the model has not seen, a motion its prior was made with and another one that
is asked for. Every method makes that second clip its own way, through DiffSynth's own pipeline.
Writes clips.csv (one line a clip), summary.csv, summary.md and the plots to --output; clips already in
clips.csv are not made again, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "tiny_wan_i2v")]

import world  # noqa: E402

FIRST_IDENTITY = 2_000_000  # a stream of identities of its own, neither the training's nor evaluate.py's
STEPS = 10
PRIOR_KINDS = ("motion", "empty", "scene", "mean")
COLUMNS = (
    "index",
    "seed",
    "old_motion",
    "new_motion",
    "method",
    "prior",
    "steps",
    "forwards",
    "shown",
    "obeyed",
    "old_kept",
    "identity_error",
    "sharpness",
    "bloom_error",
    "decided",
    "psnr",
    "shared_blooms",
    "denoise_seconds",
)


@dataclass
class Case:
    """One identity with two motions; what every method starts from. Tensors as in wan_pipeline."""

    index: int
    seed: int
    pipe: object
    settings: object  # prior_utils.RunSettings of the full run
    identity: world.Identity
    old_motion: str
    new_motion: str
    contexts: dict[str, object]  # old, new, empty, scene, mean
    image: dict[str, object]  # y, clip_feature
    noise: object

    def conditioning(self, posi: str, nega: str = "empty"):
        """The conditioning of one prompt against another."""
        from wan_pipeline import Conditioning

        return Conditioning(**self.image, context_posi=self.contexts[posi], context_nega=self.contexts[nega])

    @functools.cached_property
    def priors(self) -> dict[str, Prior]:
        """A prior of each kind, from the same noise."""
        names = {"motion": "old", "empty": "empty", "scene": "scene", "mean": "mean"}
        return {kind: make_prior(self, names[kind]) for kind in PRIOR_KINDS}


@dataclass
class Prior:
    """A full run in memory: latents before each step and at the end, guided velocities, the clip."""

    latents: list[object]
    noise_pred: list[object]
    frames: np.ndarray


def make_prior(case: Case, prompt: str) -> Prior:
    """What generate_prior.py saves."""
    from wan_pipeline import run_from

    steps = []
    result = run_from(
        case.pipe,
        case.settings,
        start_step=-1,
        latents=case.noise,
        conditioning=case.conditioning(prompt),
        on_step=steps.append,
    )
    latents = [steps[0].latents_before, *(step.latents for step in steps)]
    return Prior(latents, [step.noise_pred for step in steps], as_array(result.frames))


def as_array(frames) -> np.ndarray:
    """Frames as uint8 [T, H, W, 3]."""
    return np.stack([np.asarray(frame) for frame in frames])


# --- methods: each makes the new prompt's clip, and says what it cost ---------------------------------------


def from_noise(case: Case, prior: Prior | None, *, steps: int):
    """What anyone can do: fewer steps, DiffSynth's own schedule."""
    from wan_pipeline import run_from

    settings = replace(case.settings, num_inference_steps=steps)
    conditioning = case.conditioning("new")
    return run_from(case.pipe, settings, start_step=-1, latents=case.noise, conditioning=conditioning)


def from_noise_on(case: Case, prior: Prior | None, *, steps: tuple[int, ...]):
    """Fewer steps on chosen sigmas of the ten-step schedule; the first must be 0."""
    from wan_pipeline import ReportingScheduler, run_scheduler

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
    from wan_pipeline import run_from

    return run_from(
        case.pipe,
        case.settings,
        start_step=start_step,
        latents=prior.latents[start_step + 1],
        conditioning=case.conditioning("new", "old" if contrast else "empty"),
    )


def differential(case: Case, prior: Prior, *, steps: tuple[int, ...]):
    """--steps: a few steps along the prior's path, spent on what the new prompt changes."""
    from wan_pipeline import Trajectory, run_differential

    latents = [prior.latents[step] for step in steps] + [prior.latents[-1]]
    trajectory = Trajectory(steps, latents, [prior.noise_pred[step] for step in steps])
    return run_differential(
        case.pipe, case.settings, trajectory=trajectory, conditioning=case.conditioning("new")
    )


def video_to_video(case: Case, prior: Prior, *, steps: int, strength: float):
    """What SDEdit users do: noise the prior's finished clip again and denoise it with the new prompt."""
    import torch

    from wan_pipeline import compute_schedule, run_from

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

    from wan_pipeline import RunResult, compute_schedule, decode

    s = case.settings
    schedule = {
        name: getattr(s, name) for name in ("num_inference_steps", "denoising_strength", "sigma_shift")
    }
    sigmas = compute_schedule(**schedule)[1]
    chosen = [sigmas[step] for step in steps] + [0.0]
    source = prior.latents[-1]
    edited = source.clone()
    for sigma, sigma_next in zip(chosen, chosen[1:], strict=False):
        noised = (1 - sigma) * source + sigma * case.noise
        target = edited + noised - source
        difference = velocity(case, target, sigma, "new") - velocity(case, noised, sigma, "old")
        edited = edited + (sigma_next - sigma) * difference
    with torch.no_grad():
        frames = decode(case.pipe, edited, tiled=s.tiled)
    return RunResult(frames, edited, list(steps), 4 * len(steps))


def velocity(case: Case, latents, sigma: float, prompt: str):
    """The guided velocity at any latents and noise level."""
    import torch

    conditioning = case.conditioning(prompt)
    models = {"dit": case.pipe.dit, "y": conditioning.y, "clip_feature": conditioning.clip_feature}
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
    """Everything on the chart, the cheapest last within each family."""
    bind = functools.partial
    yield Method("full run", bind(from_noise, steps=STEPS))
    for steps in (6, 4, 3, 2, 1):
        yield Method("fewer steps", bind(from_noise, steps=steps))
    for steps in ((0, 3, 6, 8), (0, 4, 8), (0, 5, 8), (0, 7)):
        yield Method("fewer steps, chosen sigmas", bind(from_noise_on, steps=steps))
    for kind in PRIOR_KINDS:
        for start_step in (3, 5, 6, 7, 8) if kind in ("motion", "empty") else (6,):
            yield Method("resume", bind(resume, start_step=start_step), kind)
    yield Method("resume, old prompt as negative", bind(resume, start_step=6, contrast=True), "motion")
    for kind in PRIOR_KINDS:
        for steps in DIFFERENTIAL_STEPS if kind in ("motion", "empty") else ((2, 5, 8),):
            yield Method("differential", bind(differential, steps=steps), kind)
    for strength in (0.9, 0.7):
        yield Method(f"video to video {strength}", bind(video_to_video, steps=3, strength=strength), "motion")
    yield Method("FlowEdit", bind(flow_edit, steps=(0, 6)), "motion")


DIFFERENTIAL_STEPS = (
    (0, 3, 6, 8),
    (2, 5, 8),
    (0, 4, 8),
    (2, 6, 9),
    (0, 6),
    (2, 7),
    (0,),
    (4,),
)


# --- cases --------------------------------------------------------------------------------------------------


def make_case(pipe, defaults, index: int, seed: int) -> Case:
    """The index-th unseen identity, its two motions and wordings, and the seed-th noise."""
    import torch
    from PIL import Image

    import prior_utils
    from wan_pipeline import encode_image, encode_prompt

    rng = np.random.default_rng([FIRST_IDENTITY, index])
    identity = world.sample_identity(rng)
    old, new = (str(motion) for motion in rng.choice(world.MOTIONS, 2, replace=False))
    texts = {"old": world.sample_prompt(rng, old), "new": world.sample_prompt(rng, new)}
    texts |= {"empty": "", "scene": world.NEUTRAL[0]}
    contexts = {name: encode_prompt(pipe, text) for name, text in texts.items()}
    every = [encode_prompt(pipe, f"the character {world.WORDINGS[motion][0][0]}") for motion in world.MOTIONS]
    contexts["mean"] = torch.stack(every).mean(0)
    settings = prior_utils.RunSettings(
        num_inference_steps=STEPS,
        denoising_strength=1.0,
        sigma_shift=defaults.sigma_shift,
        cfg_scale=defaults.cfg_scale,
        height=defaults.height,
        width=defaults.width,
        num_frames=defaults.num_frames,
        tiled=False,
    )
    shape = prior_utils.latents_shape(
        height=settings.height, width=settings.width, num_frames=settings.num_frames
    )
    noise = pipe.generate_noise(shape, seed=seed, rand_device="cpu")
    image = encode_image(pipe, Image.fromarray(world.first_frame(identity)), num_frames=settings.num_frames)
    return Case(index, seed, pipe, settings, identity, old, new, contexts, image, noise)


def measure_case(pipe, defaults, index: int, seed: int) -> Iterator[dict]:
    """One line for every method."""
    case = make_case(pipe, defaults, index, seed)
    reference, reference_found, before = None, None, {}
    for method in methods():
        prior = None if method.prior == "none" else case.priors[method.prior]
        result = method.run(case, prior)
        frames = as_array(result.frames)
        found = world.measure(frames, case.identity)
        if reference is None:  # the first method is the full run
            reference, reference_found = frames, found
        if prior is not None and method.prior not in before:
            before[method.prior] = world.measure(prior.frames, case.identity)
        other = before.get(method.prior, reference_found)
        yield {
            "index": index,
            "seed": seed,
            "old_motion": case.old_motion,
            "new_motion": case.new_motion,
            "method": method.name,
            "prior": method.prior,
            "steps": " ".join(map(str, result.steps)),
            "forwards": result.forwards,
            "shown": found.motion,
            "obeyed": int(found.motion == case.new_motion),
            "old_kept": int(found.motion == case.old_motion),
            "identity_error": round(found.identity_error, 4),
            "sharpness": round(found.sharpness, 4),
            "bloom_error": round(found.bloom_error, 4),
            "decided": round(found.decided, 4),
            "psnr": round(psnr(frames, reference), 3),
            "shared_blooms": round(world.agreement(found, other), 4),
            "denoise_seconds": round(result.seconds.get("denoise", float("nan")), 3),
        }


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two clips in dB, 99 where they are equal."""
    error = np.mean((first.astype(np.float64) - second) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


_worker: tuple = ()  # pipeline and defaults of this process


def start_worker(threads: int) -> None:
    """Load the model once in each process."""
    global _worker
    import torch

    import wan_models

    torch.set_num_threads(threads)
    options = wan_models.LoadOptions("tiny", "cpu", "float32")
    _worker = (
        wan_models.load_pipeline(options, wan_models.weight_files(options)),
        wan_models.model_defaults("tiny"),
    )


def work(job: tuple[int, int]) -> list[dict]:
    """All lines of one case."""
    return list(measure_case(*_worker, *job))


def run_cases(jobs: list[tuple[int, int]], path: Path, *, workers: int) -> None:
    """Do the cases clips.csv doesn't hold yet."""
    from tqdm import tqdm

    rows = list(csv.DictReader(path.open())) if path.exists() else []
    done = {(int(row["index"]), int(row["seed"])) for row in rows}
    jobs = [job for job in jobs if job not in done]
    if not jobs:
        return
    os.environ["TQDM_DISABLE"] = "1"  # in the workers: only the bar over the cases is of interest
    with path.open("a", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS)
        if not rows:
            writer.writeheader()
        spawn = multiprocessing.get_context("spawn")
        with spawn.Pool(workers, start_worker, (max(1, multiprocessing.cpu_count() // workers),)) as pool:
            for lines in tqdm(pool.imap(work, jobs), total=len(jobs), desc="cases", disable=False):
                writer.writerows(lines)
                out.flush()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--identities", type=int, default=100, help="unseen identities (default: 100)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="noises per identity (default: 0)")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "promise")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--report_only", action="store_true", help="only redo summary and plots")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the cases that are missing, then report."""
    import promise_report

    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    clips = args.output / "clips.csv"
    if not args.report_only:
        # the seed goes with the identity, so that no two cases share their noise
        jobs = [(index, 1000 * seed + index) for seed in args.seeds for index in range(args.identities)]
        run_cases(jobs, clips, workers=args.workers)
    print(promise_report.write(clips, args.output))


if __name__ == "__main__":
    main()
