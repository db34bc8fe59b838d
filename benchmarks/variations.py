"""Measure what a clip of few steps is worth as a prior for its variations.

    python benchmarks/variations.py --output benchmarks/results/variations

An identity of the embedded model's that it has not seen, a prior of 50 steps that holds still, and a clip
of a motion that follows it in 4. What is then asked for is that motion mixed with another: the contexts'
mean with a weight of 0.1, 0.25 or 0.5 on the other. The model was not trained on such mixtures, but its
full run of 50 steps says what it makes of them. Against that is held the clip as it is, which costs
nothing, and what follows the clip, the still prior, or a full prior of the clip's motion (100 forwards).
Goes on where it stopped. About a minute an identity on one CPU core.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "tiny_wan_i2v")]

import promise
import world
from evaluate import psnr
from promise import Job, run_cases
from promise_methods import STEPS, Case, Prior, as_array, make_prior

from step_skip.steps import guidance_decay, spread_steps

FIRST_IDENTITY = 5_000_000  # a stream of identities of its own
CLIP_STEPS = 4
WEIGHTS = (0.1, 0.25, 0.5)
NUM_STEPS = (1, 2, 3, 4)
COLUMNS = ("index", "seed", "cfg_scale", "motion", "other", "weight", "way", "steps", "forwards", "psnr")


@dataclass
class Walked:
    """A path by its steps; what `step_skip.clip_prior` saves of a clip, or any of a full run."""

    steps: list[int]
    latents: dict[int, object]  # before each step; by step, like the next two
    noise_pred: dict[int, object]
    noise_pred_nega: dict[int, object]
    clean: object
    branch_distances: list[float]  # of a full run's every step
    frames: np.ndarray


def walked(prior: Prior) -> Walked:
    """A full run as a path of all its steps."""
    steps = list(range(STEPS))
    parts = (dict(enumerate(each)) for each in (prior.latents, prior.noise_pred, prior.noise_pred_nega))
    return Walked(steps, *parts, prior.latents[-1], prior.branch_distances, prior.frames)


def follow(case: Case, path: Walked, num_steps: int, prompt: str) -> tuple[object, Walked]:
    """Follow a path in so many of its steps; the result, and the path that it took."""
    from step_skip.differential import DifferentialScheduler, Trajectory
    from step_skip.pipeline import run_scheduler
    from step_skip.plan_steps import nearest_steps
    from step_skip.schedule import compute_schedule

    steps = nearest_steps(spread_steps(STEPS, num_steps), path.steps)
    settings = {name: getattr(case.settings, name) for name in ("denoising_strength", "sigma_shift")}
    sigmas = compute_schedule(num_inference_steps=STEPS, **settings)[1]
    trajectory = Trajectory(
        steps,
        [*(path.latents[step] for step in steps), path.clean],
        [path.noise_pred[step] for step in steps],
        [path.noise_pred_nega[step] for step in steps],
        case.settings.cfg_scale,
        guidance_decay(path.branch_distances, steps, sigmas=sigmas),
    )
    taken = []
    result = run_scheduler(
        case.pipe,
        case.settings,
        scheduler=DifferentialScheduler(trajectory, case.settings.cfg_scale),
        latents=trajectory.latents[0],
        conditioning=case.conditioning(prompt),
        known_nega=trajectory.noise_pred_nega[0],
        on_step=taken.append,
    )
    own = Walked(
        steps,
        {step.index: step.latents_before for step in taken},
        {step.index: step.noise_pred for step in taken},
        {step.index: step.noise_pred_nega for step in taken},
        result.latents,
        path.branch_distances,
        as_array(result.frames),
    )
    return result, own


def measure_variations(pipe, defaults, index: int, seed: int, cfg_scale: float) -> Iterator[dict]:
    """One line for every mixture, way and number of steps."""
    from step_skip.pipeline import encode_prompt

    case = promise.make_case(pipe, defaults, index, seed, cfg_scale)
    rng = np.random.default_rng([index])
    motion, other = (str(each) for each in rng.choice(world.MOTIONS, 2, replace=False))
    ours, theirs = (encode_prompt(pipe, world.sample_prompt(rng, each)) for each in (motion, other))
    mixtures = {f"mixture {weight}": ours.lerp(theirs, weight) for weight in WEIGHTS}
    case = replace(case, contexts=case.contexts | {"clip": ours} | mixtures)
    still, full = (walked(make_prior(case, prompt, STEPS)) for prompt in ("still", "clip"))
    _, clip = follow(case, still, CLIP_STEPS, "clip")
    about = {"index": index, "seed": seed, "cfg_scale": cfg_scale, "motion": motion, "other": other}
    for weight in WEIGHTS:
        goal = make_prior(case, f"mixture {weight}", STEPS).frames
        about["weight"] = weight
        yield about | {
            "way": "the clip as it is",
            "steps": 0,
            "forwards": 0,
            "psnr": decibels(clip.frames, goal),
        }
        for way, path in (("a prior that holds still", still), ("the clip", clip), ("a full prior", full)):
            for steps in NUM_STEPS:
                result, _ = follow(case, path, steps, f"mixture {weight}")
                value = decibels(as_array(result.frames), goal)
                yield about | {"way": way, "steps": steps, "forwards": result.forwards, "psnr": value}


def decibels(frames: np.ndarray, goal: np.ndarray) -> float:
    """PSNR in dB of uint8 [T, H, W, 3], both."""
    return round(psnr(frames, goal), 3)


def work(job: Job) -> list[dict]:
    """All lines of one case."""
    return list(measure_variations(*promise._worker, *job))


def write_table(clips: Path) -> str:
    """The means as a table, also beside the clips; guidance 2 / 5 and the like in every cell."""
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    rows = list(csv.DictReader(clips.open()))
    scales = sorted({row["cfg_scale"] for row in rows}, key=float)
    for row in rows:
        way = row["way"] + (
            f", {row['steps']} steps, {row['forwards']} forwards" if int(row["steps"]) else ""
        )
        found[way, row["weight"], row["cfg_scale"]].append(float(row["psnr"]))
    weights = [f"{weight}" for weight in WEIGHTS]
    lines = [
        f"PSNR in dB to the 50-step run at guidance {' / '.join(scales)}; "
        f"{len({row['index'] for row in rows})} identities",
        "",
        "| what is followed | " + " | ".join(f"{weight} of another motion" for weight in weights) + " |",
        "| --- |" + " --- |" * len(weights),
    ]
    for way in dict.fromkeys(way for way, _, _ in found):
        cells = (" / ".join(f"{np.mean(found[way, w, scale]):.1f}" for scale in scales) for w in weights)
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    clips.with_name("summary.md").write_text(text)
    return text


def main(argv: list[str] | None = None) -> None:
    """Run the cases that are missing, then report."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--identities", type=int, default=12, help="unseen identities (default: 12)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[2, 5], help="cfg_scale (default: 2 5)")
    parser.add_argument("--output", type=Path, default=HERE / "out" / "variations")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    promise.check_same_setup(args.output / "setup.json", [])
    jobs = [(FIRST_IDENTITY + i, i, scale) for i in range(args.identities) for scale in args.guidance]
    run_cases(jobs, args.output / "clips.csv", workers=args.workers, work=work, columns=COLUMNS)
    print(write_table(args.output / "clips.csv"))


if __name__ == "__main__":
    main()
