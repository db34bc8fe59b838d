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
from dataclasses import replace
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "tiny_wan_i2v")]

import promise
import world
from evaluate import psnr
from promise import Job, run_cases
from promise_methods import STEPS, Case, Prior, as_array, differential, make_prior
from promise_report import Row, guidances, guided_by, mean_of, table

FIRST_IDENTITY = 5_000_000  # a stream of identities of its own
CLIP_STEPS = 4
WEIGHTS = (0.1, 0.25, 0.5)
NUM_STEPS = (1, 2, 3, 4)
COLUMNS = ("index", "seed", "cfg_scale", "motion", "other", "weight", "way", "steps", "forwards", "psnr")


def clip_prior(case: Case, followed: Prior) -> Prior:
    """A clip that follows a prior in CLIP_STEPS, as a prior: what `step_skip.infer.as_prior` saves of it."""
    taken = []
    result = differential(case, followed, steps=CLIP_STEPS, on_step=taken.append)
    latents, noise_pred, noise_pred_nega = ([None] * STEPS for _ in range(3))
    for step in taken:
        latents[step.index] = step.latents_before
        noise_pred[step.index], noise_pred_nega[step.index] = step.noise_pred, step.noise_pred_nega
    return Prior(
        followed.settings,
        [*latents, result.latents],
        noise_pred,
        noise_pred_nega,
        followed.branch_distances,
        as_array(result.frames),
        kept_steps=[step.index for step in taken],
    )


def measure_variations(pipe, defaults, index: int, seed: int, cfg_scale: float) -> Iterator[dict]:
    """One line for every mixture, way and number of steps."""
    from step_skip.pipeline.run import encode_prompt

    case = promise.make_case(pipe, defaults, index, seed, cfg_scale)
    rng = np.random.default_rng([index])
    motion, other = (str(each) for each in rng.choice(world.MOTIONS, 2, replace=False))
    ours, theirs = (encode_prompt(pipe, world.sample_prompt(rng, each)) for each in (motion, other))
    case = replace(case, contexts=case.contexts | {"new": ours})
    still, full = (make_prior(case, prompt, STEPS) for prompt in ("still", "new"))
    clip = clip_prior(case, still)
    about = {"index": index, "seed": seed, "cfg_scale": cfg_scale, "motion": motion, "other": other}
    for weight in WEIGHTS:
        case = replace(case, contexts=case.contexts | {"new": ours.lerp(theirs, weight)})
        goal = make_prior(case, "new", STEPS).frames
        about["weight"] = weight
        kept = {"way": "the clip as it is", "steps": 0, "forwards": 0, "psnr": decibels(clip.frames, goal)}
        yield about | kept
        for way, prior in (("a prior that holds still", still), ("the clip", clip), ("a full prior", full)):
            for steps in NUM_STEPS:
                result = differential(case, prior, steps=steps)
                value = decibels(as_array(result.frames), goal)
                yield about | {"way": way, "steps": steps, "forwards": result.forwards, "psnr": value}


def decibels(frames: np.ndarray, goal: np.ndarray) -> float:
    """PSNR in dB of uint8 [T, H, W, 3], both."""
    return round(psnr(frames, goal), 3)


def work(job: Job) -> list[dict]:
    """All lines of one case."""
    return list(measure_variations(*promise._worker, *job))


def write_table(clips: Path) -> str:
    """The means as a table, also beside the clips; both guidances in every cell."""
    rows = list(csv.DictReader(clips.open()))
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        steps = f", {row['steps']} steps, {row['forwards']} forwards" if int(row["steps"]) else ""
        found[row["way"] + steps].append(row)

    def cell(members: list[Row], weight: float) -> str:
        some = [row for row in members if float(row["weight"]) == weight]
        return " / ".join(mean_of(guided_by(some, scale), "psnr", 1) for scale in guidances(rows))

    head = ("what is followed", *(f"{weight} of another motion" for weight in WEIGHTS))
    lines = [[way, *(cell(members, weight) for weight in WEIGHTS)] for way, members in found.items()]
    scales = " / ".join(f"{scale:g}" for scale in guidances(rows))
    identities = len({row["index"] for row in rows})
    about = f"PSNR in dB to the 50-step run at guidance {scales}; {identities} identities"
    text = f"{about}\n\n{table(head, lines)}"
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
