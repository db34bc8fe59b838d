"""How alike is what the middle blocks add from step to step? Skip-Cache lives on it.

    python benchmarks/smoothness.py

On guided runs of the embedded model, for unseen identities: the error of using again what was added one, two
or three steps before, as a share of what is added, at every step; and what the trained branch (distil.py)
leaves of it, where the model has one. Writes smoothness.md and smoothness.png to --output.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "tiny_wan_i2v")]

import distil

from step_skip.models.loading import load_pipeline
from step_skip.models.weights import LoadOptions, model_defaults, weight_files
from step_skip.pipeline.schedulers import compute_schedule

STEPS = 10
SEED = 1  # distil.py fits the branch on seed 0's identities
COLOURS = ("#1e8449", "#d4ac0d", "#c0392b")  # by steps apart

Errors = dict[tuple[str, int], list[float]]  # by form and steps apart: one for each step


@torch.no_grad()
def measure(pipe, defaults, *, identities: int, clips: int) -> Errors:
    """Root mean square error of the reuse over that of what is right, over all clips and tokens."""
    schedule = {"denoising_strength": 1.0, "sigma_shift": defaults.sigma_shift}
    sigmas = compute_schedule(num_inference_steps=STEPS, **schedule)[1]
    features, branch = distil.Features(pipe.dit.blocks), getattr(pipe.dit, "skip_branch", None)
    sums: dict[tuple[str, int], torch.Tensor] = {}
    for each in distil.draw(pipe, defaults, identities=identities, clips=clips, seed=SEED):
        list(distil.guided_run(pipe, each, sigmas, defaults.cfg_scale))
        shallow, added = features.take()
        for apart in range(1, distil.MAX_APART + 1):
            now, kept, right = shallow[apart:], added[:-apart], added[apart:]
            reused = {"plain reuse": kept}
            if branch is not None:
                reused["with the branch"] = kept + branch(now, kept, age=apart)
            for form, used in reused.items():
                squares = torch.stack([(used - right).square(), right.square()]).flatten(2).sum(2)
                sums[form, apart] = sums.get((form, apart), 0) + squares
    return {key: (wrong / all_).sqrt().tolist() for key, (wrong, all_) in sums.items()}


def as_markdown(errors: Errors) -> str:
    """The table: a line for each form and number of steps apart."""
    head = ["form", "steps apart", *(f"step {step}" for step in range(1, STEPS))]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for (form, apart), values in errors.items():
        cells = [""] * (apart - 1) + [f"{value:.3f}" for value in values]
        lines.append(f"| {form} | {apart} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(errors: Errors, path: Path) -> None:
    """The error over the steps."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for (form, apart), values in errors.items():
        style = "o-" if form == "plain reuse" else "o--"
        label = f"{form}, {apart} step{'s' * (apart > 1)} apart"
        axis.plot(range(apart, STEPS), values, style, ms=4, color=COLOURS[apart - 1], label=label)
    axis.set(xlabel="step", ylabel="error / what is added (rms)", ylim=(0, None))
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Measure, write the table and the plot, print the table's path."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--identities", type=int, default=20, help="unseen identities (default: 20)")
    parser.add_argument("--clips", type=int, default=4, help="clips of each (default: 4)")
    parser.add_argument("--model_dir", type=Path, help="the model's folder (default: data/tiny_wan_i2v)")
    parser.add_argument("--output", type=Path, default=HERE / "out" / "cheaper")
    args = parser.parse_args(argv)
    options = LoadOptions("tiny", "cpu", "float32", model_dir=args.model_dir)
    pipe = load_pipeline(options, weight_files(options))
    defaults = model_defaults("tiny", args.model_dir)
    errors = measure(pipe, defaults, identities=args.identities, clips=args.clips)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "smoothness.md").write_text(as_markdown(errors))
    plot(errors, args.output / "smoothness.png")
    print(args.output / "smoothness.md")


if __name__ == "__main__":
    main()
