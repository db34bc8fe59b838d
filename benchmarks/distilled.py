"""Measure what a distilled LoRA and a prior give together: the LoRA alone, and followed from its own priors.

    python benchmarks/distilled.py --output benchmarks/results/distilled

The embedded model's LoRA was distilled for 4 steps without guidance. The cases are promise.py's: the LoRA
from noise in 4, 3, 2, 1 steps; its own priors of 4, 8, 16, 50 steps, of a prompt that holds still, followed
in 1, 2, 3 steps of one forward each; the base model's own prior of 50 steps in 1 to 4. All of it is held
against the base model's full run of 50 steps. Goes on where it stopped; half a minute a case on a core.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MODEL_DIR = ROOT / "data" / "tiny_wan_i2v"
sys.path[:0] = [str(ROOT), str(MODEL_DIR)]

import promise
from promise import COLUMNS, Job, look, make_case, rate, run_cases
from promise_methods import PRIORS, Case, Method, differential, from_noise, make_prior
from promise_report import CLASSES, group, mean_of, moving, table

CFG_SCALE = 2.0
DISTILLED = MODEL_DIR / "distilled_lora.safetensors"
LORA_PRIOR = "the LoRA's, {} steps"
LORA_PRIORS = (4, 8, 16, 50)


def methods() -> Iterator[Method]:
    """The full run first, then what the LoRA makes, then the base model."""
    bind = functools.partial
    yield Method("the base model, 50 steps", bind(from_noise, steps=50))
    for steps in (4, 3, 2, 1):
        yield Method(f"the LoRA from noise, {steps} steps", bind(with_lora, run=from_noise, steps=steps))
    for prior in LORA_PRIORS:
        for steps in (1, 2, 3):
            run = bind(with_lora, run=differential, steps=steps)
            yield Method(f"differential, {steps} steps", run, LORA_PRIOR.format(prior))
    for steps in (1, 2, 3, 4):
        yield Method(f"differential, {steps} steps", bind(differential, steps=steps), "still")


@functools.cache
def distilled_dit(pipe):
    """A copy of the pipeline's DiT with the LoRA in it."""
    dit = copy.deepcopy(pipe.dit)
    pipe.load_lora(dit, str(DISTILLED))
    return dit


@contextlib.contextmanager
def lora_in(case: Case) -> Iterator[Case]:
    """The case with the distilled DiT and no guidance, while it lasts."""
    base, case.pipe.dit = case.pipe.dit, distilled_dit(case.pipe)
    try:
        yield replace(case, settings=replace(case.settings, cfg_scale=1.0))
    finally:
        case.pipe.dit = base


def with_lora(case: Case, prior, *, run, steps: int):
    """A method with the LoRA, without guidance."""
    with lora_in(case) as distilled:
        return run(distilled, prior, steps=steps)


def work(job: Job) -> list[dict]:
    """All lines of one case."""
    case = make_case(*promise._worker, *job)
    distilled_dit(case.pipe)  # from the DiT as it is before any other takes its place
    priors = {"still": PRIORS["still"](case)}
    with lora_in(case) as distilled:
        for steps in LORA_PRIORS:
            priors[LORA_PRIOR.format(steps)] = make_prior(distilled, "still", steps)
    lines, full = [], None
    for method in methods():
        result = method.run(case, priors.get(method.prior))
        shown = look(case, result)
        full = shown if full is None else full
        lines.append(rate(case, method, result, shown, full))
    return lines


def summarize(rows: list[dict]) -> str:
    """The table of all methods, dearest first."""
    head = ("how the new prompt's clip is made", "prior", "forwards", "obeyed", "identity error", "decided")
    lines = []
    for (method, prior), some in group(rows).items():
        cells = [method, prior, some[0]["forwards"], mean_of(some, "obeyed", 2)]
        cells += [mean_of(some, "identity_error", 1), mean_of(some, "decided", 2)]
        cells += [mean_of(moving(some, kind), "psnr", 1, interval=True) for kind in CLASSES]
        lines.append((int(some[0]["forwards"]), cells))
    lines = lines[:1] + sorted(lines[1:], key=lambda line: -line[0])
    return table((*head, *(f"PSNR, {kind}" for kind in CLASSES)), [cells for _, cells in lines])


def main(argv: list[str] | None = None) -> None:
    """Run the cases that are missing, then report."""
    import csv

    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--identities", type=int, default=14, help="unseen identities (default: 14)")
    parser.add_argument("--output", type=Path, default=HERE / "out" / "distilled")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    clips = args.output / "clips.csv"
    promise.check_same_setup(args.output / "setup.json", list(methods()))
    jobs = [(index, index, CFG_SCALE) for index in range(args.identities)]
    run_cases(jobs, clips, workers=args.workers, work=work, columns=COLUMNS)
    with clips.open(newline="") as file:
        summary = summarize(list(csv.DictReader(file)))
    (args.output / "summary.md").write_text(summary)
    print(summary)


if __name__ == "__main__":
    main()
