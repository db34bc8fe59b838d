"""Measure what several priors of one image are worth, and what the first evaluation says of the outcome.

    python benchmarks/bank.py --output benchmarks/results/bank
    python benchmarks/bank.py --fit --output benchmarks/results/closeness

An identity of the embedded model's that it has not seen, eight priors of it with motions drawn from the ten,
one that holds still, and a motion asked for in other words than any of theirs. Every way follows one prior in
a few steps: the still one, or of the first 1, 2, 4, 8 the nearest by the velocity of the first step, which
is evaluated anyway. Held against the full run of 50 steps from the same noise.

The runs of --fit are of other identities: step_skip/closeness.py's numbers for every number of steps are
fitted to them, and the others tell how near they come. Goes on where it stopped. About a minute an identity
on one CPU core.
"""

from __future__ import annotations

import argparse
import sys
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
from promise import Job, run_cases, ssim
from promise_methods import STEPS, Case, as_array, differential, make_prior

from step_skip.method.closeness import velocity_distance
from step_skip.method.differential import Velocity, corrected_offset, fading_rate

FIT_IDENTITY, TEST_IDENTITY = 3_000_000, 4_000_000  # streams of identities of their own
BANK = 8
FEW_STEPS = 10  # of a prior, and of the full run its clips are held against
FIRST = (1, 2, 4, 8)
NUM_STEPS = (1, 2, 3, 4, 6)
COLUMNS = (
    "index",
    "seed",
    "cfg_scale",
    "new_motion",
    "path",
    "motion_of_path",
    "steps",
    "forwards",
    "apart",
    "as_it_is",
    "apart_per_step",
    "turn_per_step",
    "obeyed",
    "identity_error",
    "psnr",
    "ssim",
)


def make_bank_case(pipe, defaults, index: int, seed: int, cfg_scale: float) -> tuple[Case, list[str]]:
    """A case whose contexts hold those of a bank, too, by the names bank 0 ..., and the bank's motions."""
    from step_skip.pipeline.run import encode_prompt

    case = promise.make_case(pipe, defaults, index, seed, cfg_scale)
    rng = np.random.default_rng([index])
    new, *_ = motions = [str(motion) for motion in rng.choice(world.MOTIONS, BANK + 1)]
    motions[1:] = [str(motion) for motion in rng.choice(world.MOTIONS, BANK, replace=False)]
    texts = [world.sample_prompt(rng, new)]
    for motion in motions[1:]:
        text = texts[0]
        while without_subject(text) == without_subject(texts[0]):  # a prior's own prompt gives its own clip
            text = world.sample_prompt(rng, motion)
        texts.append(text)
    names = ["new", *(f"bank {i}" for i in range(BANK))]
    contexts = {name: encode_prompt(pipe, text) for name, text in zip(names, texts, strict=True)}
    return replace(case, new_motion=new, contexts=case.contexts | contexts), motions[1:]


def without_subject(text: str) -> str:
    """What a prompt says that happens."""
    return text.removeprefix(next(each for each in world.SUBJECTS if text.startswith(each)))


def measure_bank(pipe, defaults, index: int, seed: int, cfg_scale: float) -> Iterator[dict]:
    """One line for every path that is followed and every number of steps."""
    case, motions = make_bank_case(pipe, defaults, index, seed, cfg_scale)
    full, still = (make_prior(case, prompt, STEPS) for prompt in ("new", "still"))
    bank = [make_prior(case, f"bank {i}", STEPS) for i in range(BANK)]
    apart = [first_distance(prior, full) for prior in bank]
    paths = {"still": (still, "still", full)}
    for first in FIRST:
        nearest = int(np.argmin(apart[:first]))
        paths[f"nearest of {first}"] = bank[nearest], motions[nearest], full
    few = make_prior(case, "new", FEW_STEPS)
    for name, prompt, motion in (("still", "still", "still"), ("nearest of 1", "bank 0", motions[0])):
        paths[f"{name}, {FEW_STEPS} steps"] = make_prior(case, prompt, FEW_STEPS), motion, few
    made: dict[tuple[int, int], dict] = {}
    for name, (prior, motion, goal) in paths.items():
        for steps in NUM_STEPS:
            if (id(prior), steps) not in made:
                seen: list[tuple[float, float]] = []
                result = differential(case, prior, steps=steps, **watching(seen))
                made[id(prior), steps] = compare(case, result, goal) | dict(
                    zip(("apart_per_step", "turn_per_step"), zip(*seen, strict=True), strict=True)
                )
            yield {
                "index": index,
                "seed": seed,
                "cfg_scale": cfg_scale,
                "new_motion": case.new_motion,
                "path": name,
                "motion_of_path": motion,
                "steps": steps,
                "apart": first_distance(prior, goal),
                "as_it_is": round(psnr(prior.frames, goal.frames), 3),  # the clip it has, for no forward
                **made[id(prior), steps],
            }


def watching(seen: list[tuple[float, float]]) -> dict:
    """Return parts for `follow` that note the distance of the new velocity from the prior's at each step.

    Args:
        seen: gets a pair for each step: the distance, and how the difference turned since the step before.
    """
    last = []

    def note(new: Velocity, old: Velocity) -> None:
        now = new.guided - old.guided
        seen.append((rms(now), rms(now - last.pop() if last else now)))
        last.append(now)

    def rate_of(new: Velocity, old: Velocity) -> float:  # called at the first step
        note(new, old)
        return fading_rate(new, old)

    def correct(offset, start, new: Velocity, old: Velocity, *, sigma: float):  # called at all others
        note(new, old)
        return corrected_offset(offset, start, new, old, sigma=sigma)

    return {"rate_of": rate_of, "correct": correct}


def first_distance(prior, full) -> float:
    """How far a prior's first velocity is from the new clip's, which is the full run's."""
    return round(velocity_distance(full.noise_pred[0], prior.noise_pred[0]), 6)


def rms(tensor) -> float:
    """Root mean square."""
    return round(float(tensor.float().square().mean().sqrt()), 6)


def compare(case: Case, result, full) -> dict:
    """What came out, against the full run."""
    frames = as_array(result.frames)
    found = world.measure(frames, case.identity)
    return {
        "forwards": result.forwards,
        "obeyed": int(found.motion == case.new_motion),
        "identity_error": round(found.identity_error, 4),
        "psnr": round(psnr(frames, full.frames), 3),
        "ssim": round(ssim(frames, full.frames), 5),
    }


def work(job: Job) -> list[dict]:
    """All lines of one case."""
    return list(measure_bank(*promise._worker, *job))


def main(argv: list[str] | None = None) -> None:
    """Run the cases that are missing, then report."""
    import bank_report

    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--fit", action="store_true", help="the identities that closeness.py is fitted to")
    parser.add_argument("--identities", type=int, default=24, help="unseen identities (default: 24)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[2, 5], help="cfg_scale (default: 2 5)")
    parser.add_argument("--output", type=Path, default=HERE / "out" / "bank")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--report_only", action="store_true", help="only redo the tables")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    clips, first = args.output / "clips.csv", FIT_IDENTITY if args.fit else TEST_IDENTITY
    if not args.report_only:
        promise.check_same_setup(args.output / "setup.json", [])
        jobs = [
            (first + index, index, cfg_scale)
            for index in range(args.identities)
            for cfg_scale in args.guidance
        ]
        run_cases(jobs, clips, workers=args.workers, work=work, columns=COLUMNS)
    print(bank_report.write(clips, args.output))


if __name__ == "__main__":
    main()
