"""The core of the promise's table on a real model, for whoever has the GPU and the weights.

    python benchmarks/promise_real.py --model I2V-480P --images a.jpg b.jpg \\
        --prompts "She turns her head and laughs." "She looks up at the sky." --output real
    python benchmarks/promise_real.py --model tiny --images data/tiny_wan_i2v/inputs/mila.png \\
        --prompts "she moves to the left" "she comes closer" --output real

No truth is known here, so obedience is for the eye: contact_sheet.png shows first, middle and last frame of
every method. The number is the distance in latents to the full run with the same noise, as a share
of the distance between the full runs of two prompts: 0 is the full run itself, 1 is the other prompt's.
The first prompt makes the motion prior, the others are asked for. Loads the model once, and makes both priors
again for every picture and prompt.
"""

from __future__ import annotations

import argparse
import csv
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from promise_methods import (
    STEPS,
    Case,
    Method,
    differential,
    from_noise,
    from_noise_on,
    make_prior,
    resume,
    with_solver,
)

from step_skip.cli.flags import Parser, add_model_arguments
from step_skip.cli.terminal import run_script
from step_skip.media.images import fit_image, open_image
from step_skip.method.steps import recommended_num_steps, recommended_start_step
from step_skip.models.families import latents_shape
from step_skip.models.loading import load_pipeline
from step_skip.models.machine import pick_device
from step_skip.models.memory import HOMES
from step_skip.models.weights import LoadOptions, model_defaults, weight_files
from step_skip.pipeline.settings import RunSettings

PRIORS = {"motion": "old", "still": "still"}  # by kind: whose context
LABEL_WIDTH = 24  # characters


def methods(steps: int) -> Iterator[Method]:
    """promise.py's methods that a user chooses between, the full run of so many steps first."""
    few, after = recommended_num_steps(steps), recommended_start_step(steps)
    yield Method(f"Euler, {steps} steps", partial(from_noise, steps=steps))
    yield Method(f"Euler, {few} steps on our sigmas", partial(from_noise_on, steps=few))
    solver = partial(with_solver, steps=few, solver="DPM++ 2M", chosen=True)
    yield Method(f"DPM++ 2M, {few} steps on our sigmas", solver, "still")
    recipe = f"the original recipe: resume after {after} of {steps}"
    yield Method(recipe, partial(resume, start_step=after), "motion")
    for kind in ("motion", "still"):
        yield Method(f"differential, {few} steps", partial(differential, steps=few), kind)
    yield Method("differential, 2 steps", partial(differential, steps=2), "still")


def load(args: argparse.Namespace):
    """The pipeline, all components."""
    defaults = model_defaults(args.model, args.model_dir)
    args.device = pick_device(args.model, args.device)
    args.dtype = args.dtype or defaults.dtype
    options = LoadOptions(args.model, args.device, args.dtype, args.vram, args.model_dir)
    return load_pipeline(options, weight_files(options)), defaults


def make_case(
    pipe, defaults, image_path: Path, prompts: dict[str, str], *, num_inference_steps: int, seed: int
) -> Case:
    """One picture with its prompts: old and still, of its priors, and new, which is asked for."""
    from step_skip.pipeline.run import encode_image, encode_prompt

    sizes = {name: getattr(defaults, name) for name in ("height", "width", "num_frames")}
    image = fit_image(open_image(image_path), width=sizes["width"], height=sizes["height"])
    settings = RunSettings(
        num_inference_steps=num_inference_steps,
        denoising_strength=1.0,
        sigma_shift=defaults.sigma_shift,
        cfg_scale=defaults.cfg_scale,
        **sizes,
    )
    texts = prompts | {"empty": defaults.negative_prompt}
    contexts = {name: encode_prompt(pipe, text) for name, text in texts.items()}
    noise = pipe.generate_noise(latents_shape(**sizes), seed=seed, rand_device="cpu")
    identity = encode_image(pipe, image, num_frames=sizes["num_frames"])
    return Case(0, seed, pipe, settings, None, "", "", contexts, identity, noise)


def compare(case: Case) -> tuple[list[dict], list[list]]:
    """One line and a few frames for every method."""
    steps = case.settings.num_inference_steps
    priors = {kind: make_prior(case, prompt, steps) for kind, prompt in PRIORS.items()}
    rows, frames, full = [], [], None
    for method in methods(steps):
        result = method.run(case, priors.get(method.prior))
        latents = result.latents.float().cpu()
        if full is None:
            full = latents
            scale = (priors["motion"].latents[-1].float().cpu() - full).square().mean().sqrt()
        rows.append(
            {
                "method": method.name,
                "prior": method.prior,
                "forwards": result.forwards,
                "denoise_seconds": round(result.seconds["denoise"], 2),
                "distance": round(float((latents - full).square().mean().sqrt() / scale), 4),
            }
        )
        frames.append([result.frames[i] for i in (0, len(result.frames) // 2, -1)])
    return rows, frames


def label(row: dict) -> str:
    """What stands beside a method's frames."""
    lines = textwrap.wrap(row["method"], LABEL_WIDTH)
    return "\n".join([*lines, f"{row['prior']} prior", f"{row['distance']:.2f}"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--images", type=Path, nargs="+", required=True)
    parser.add_argument("--prompts", nargs="+", required=True, help="at least two; the first makes the prior")
    parser.add_argument(
        "--still_prompt",
        default="the character stays still",
        help="makes the prior that holds still",
    )
    parser.add_argument(
        "--num_inference_steps",
        type=int,
        default=STEPS,
        help="of the full run and of the priors",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for clips.csv and contact_sheet.png"
    )
    add_model_arguments(
        parser, model="I2V-480P", model_help="tiny runs on a CPU", dtype_help="default: the model's"
    )
    parser.add_argument("--vram", choices=("auto", *HOMES), default="auto", help="as generate_prior.py's")
    args = parser.parse_args(argv)
    if len(args.prompts) < 2:
        parser.error("--prompts takes at least two")
    if args.num_inference_steps < 4:
        parser.error(f"--num_inference_steps {args.num_inference_steps}: expected at least 4")
    return args


def main(argv: list[str] | None = None) -> Path:
    """Compare the methods on every picture and new prompt."""
    from picture import draw

    args = parse_args(argv)
    pipe, defaults = load(args)
    args.output.mkdir(parents=True, exist_ok=True)
    table, sheet = [], []
    for image in args.images:
        for prompt in args.prompts[1:]:
            prompts = {"old": args.prompts[0], "still": args.still_prompt, "new": prompt}
            steps = {"num_inference_steps": args.num_inference_steps, "seed": args.seed}
            case = make_case(pipe, defaults, image, prompts, **steps)
            rows, frames = compare(case)
            table += [{"image": image.name, "prompt": prompt} | row for row in rows]
            sheet += list(zip(map(label, rows), frames, strict=True))
    with (args.output / "clips.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, table[0])
        writer.writeheader()
        writer.writerows(table)
    draw(sheet).save(args.output / "contact_sheet.png")
    return args.output / "clips.csv"


if __name__ == "__main__":
    run_script(main)
