"""A prior and a clip on a pipeline of diffusers, here the embedded model's, on the CPU.

    python integrations/diffusers/example.py
    python integrations/diffusers/example.py --compare    # the same by DiffSynth, and how far they are apart

Of the real model the pipeline is instead

    model = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
    WanImageToVideoPipeline.from_pretrained(model, torch_dtype=torch.bfloat16)

with no sizes given: height, width, num_frames, cfg_scale and negative_prompt are Wan's by default.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusers import WanImageToVideoPipeline
from diffusers.utils import export_to_video
from embedded import embedded_pipeline

import step_skip
from step_skip import Prior, load
from step_skip.diffusers import generate_prior, infer_from_prior
from step_skip.models.weights import TINY_DIR

OF_EMBEDDED = {"height": 96, "width": 96, "num_frames": 17, "fps": 8, "cfg_scale": 2.0, "negative_prompt": ""}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", type=Path, default=TINY_DIR / "inputs" / "mila.png")
    parser.add_argument("--prompt", default="she moves to the left", help="the new motion")
    parser.add_argument("--num_inference_steps", type=int, default=20, help="of the prior")
    parser.add_argument("--num_steps", type=int, default=4, help="of the clip")
    parser.add_argument("--compare", action="store_true", help="run DiffSynth on the same prior, too")
    parser.add_argument("--output_dir", type=Path, default=Path("prior_output"))
    return parser.parse_args()


def main() -> None:
    """Make a prior and a clip; print what they cost and where the clip is."""
    args = parse_args()
    pipe = embedded_pipeline()
    prior = generate_prior(
        pipe,
        args.image,
        "she stays still",
        output_dir=args.output_dir,
        num_inference_steps=args.num_inference_steps,
        **OF_EMBEDDED,
    )
    clip = infer_from_prior(pipe, prior, args.prompt, num_steps=args.num_steps)
    path = export_to_video(clip.frames, str(prior.directory / "clip.mp4"), fps=8)
    print(f"{clip.forwards} forwards, the prior took {prior.metadata.forwards}")
    print(path)
    if args.compare:
        compare(pipe, prior, args.prompt, num_steps=args.num_steps)


def compare(pipe: WanImageToVideoPipeline, prior: Prior, prompt: str, *, num_steps: int) -> None:
    """Print how far both frameworks' latents are apart, on one prior with one conditioning."""
    model = load("tiny")
    for text, steps in (
        (None, {"start_step": 0}),  # the prior's own prompt: all of its steps after the first
        (prompt, {"start_step": prior.num_inference_steps // 2}),
        (prompt, {"num_steps": num_steps}),
    ):
        theirs = infer_from_prior(pipe, prior, text, **steps).latents
        ours = step_skip.infer_from_prior(model, prior, text, progress=False, **steps).latents
        difference, deviation = float((theirs - ours).abs().max()), float(ours.std())
        print(f"{text or 'own prompt'}, {steps}: {difference:.1e}, standard deviation {deviation:.2f}")


if __name__ == "__main__":
    main()
