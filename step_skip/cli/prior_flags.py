"""The flags of generate_prior.py alone; flags.py has those of both scripts, and their types."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from step_skip.cli import flags
from step_skip.errors import InputError
from step_skip.generate.choices import PriorChoices, check_images, check_prior_choices
from step_skip.media.images import FITS
from step_skip.media.videos import read_video
from step_skip.models.families import FAMILIES
from step_skip.models.weights import family_name
from step_skip.pipeline.settings import RunSettings
from step_skip.prior.prior import PREVIEW_FILE
from step_skip.prior.writer import check_run_id

if TYPE_CHECKING:
    from PIL.Image import Image


def add_identity_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says who is seen and what happens."""
    group = parser.add_argument_group("identity")
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--image",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="picture of the identity, the first frame of every video; of several, or of a folder with any "
        "number, each becomes a prior; for a model that takes one: T2V models make a prior of each --prompt "
        "instead, TI2V-5B can do either",
    )
    source.add_argument(
        "--download_example", action="store_true", help="fetch DiffSynth's example image and use it"
    )
    source.add_argument(
        "--resume",
        type=flags.utf8_path,
        metavar="RUN_DIR",
        help="finish this prior; its settings are recorded, so only --model_dir, --device, --vram and "
        "--preview go with it",
    )
    group.add_argument(
        "--end_image",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="the last frame of every video, for FLF2V-14B and, if wished, Fun-1.3B-InP; one for all images "
        "or one for each",
    )
    group.add_argument(
        "--prompt",
        type=flags.utf8_text,
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="what happens in the prior's own video; best is one that holds still, 'she stays still', or for "
        "--start_step none at all, a neutral prior; of several, each image becomes a prior with each, or "
        "with its own where there are as many as files",
    )
    group.add_argument(
        "--negative_prompt",
        type=flags.utf8_text,
        metavar="TEXT",
        help="what to steer away from (default: Wan's usual one; tiny: none)",
    )
    group.add_argument(
        "--input_video",
        type=Path,
        metavar="FILE",
        help="start from this video; needs --denoising_strength below 1",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what fixes schedule, noise and size."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--num_inference_steps",
        type=flags.positive_int,
        default=10,
        metavar="N",
        help="steps of the full run",
    )
    group.add_argument(
        "--sigma_shift",
        type=flags.positive_float,
        metavar="X",
        help="how much of the schedule is spent at high noise (default: 5)",
    )
    group.add_argument(
        "--denoising_strength",
        type=flags.strength,
        default=1.0,
        metavar="X",
        help="below 1: start from --input_video with less noise",
    )
    group.add_argument(
        "--cfg_scale",
        type=flags.positive_float,
        metavar="X",
        help="how strongly the prompt is followed; 1 switches guidance off and halves the cost "
        "(default: 5; tiny: 2)",
    )
    group.add_argument(
        "--cfg_scale_2",
        type=flags.positive_float,
        metavar="X",
        help="of two experts the low-noise one's (default: --cfg_scale where that is given; T2V-A14B: 3)",
    )
    group.add_argument(
        "--switch_DiT_boundary",
        type=flags.strength,
        metavar="X",
        help="sigma below which the second of two experts takes over (default: the model's; I2V-A14B: 0.9, "
        "T2V-A14B: 0.875)",
    )
    group.add_argument(
        "--stop_after",
        type=flags.non_negative_int,
        metavar="N",
        help="stop after this step and decode what it points at: a draft, that infer_from_prior.py resumes "
        "from this step or an earlier one, and --resume finishes",
    )
    group.add_argument(
        "--seed",
        type=flags.limited("seed", int),
        nargs="+",
        default=[PriorChoices.seed],
        metavar="N",
        help=f"of the initial noise (default: {PriorChoices.seed}); of several, each makes a prior",
    )
    sizes = parser.add_argument_group(
        "video",
        "with no size given the video has the image's own aspect ratio at the model's area (480 x 832; "
        "I2V-720P: 720 x 1280) and 81 frames; tiny keeps 96 x 96, 17; sizes given are rounded up as the "
        "model needs",
    )
    sizes.add_argument(
        "--fit",
        choices=FITS,
        default="crop",
        help="what becomes of an image of another shape than the video's: its middle is seen, all of it on "
        "--background, or all of it out of shape",
    )
    sizes.add_argument(
        "--background",
        default="white",
        metavar="COLOUR",
        help="what shows through where an image is transparent, and around one with --fit pad",
    )
    for name, unit in (("height", "pixels"), ("width", "pixels"), ("num_frames", "frames")):
        sizes.add_argument(f"--{name}", type=flags.limited(name, int), metavar="N", help=unit)
    sizes.add_argument(
        "--fps",
        type=flags.limited("fps", float),
        metavar="X",
        help="frames per second (default: 16; tiny: 8)",
    )


def add_prior_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where the prior goes and what else is kept."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_dir",
        type=flags.utf8_path,
        default=Path("prior_output"),
        metavar="DIR",
        help="the prior is run_<id> in there",
    )
    group.add_argument(
        "--run_id",
        nargs="+",
        metavar="ID",
        help="letters, digits, . _ and -, one for each prior (default: the image's name, mila, mila_2 ...; "
        "without an image the prompt's; a prior of the same image, prompt, seed, settings and weights that "
        "is there under such a name is not made again)",
    )
    group.add_argument(
        "--start_step",
        type=flags.non_negative_int,
        metavar="N",
        help="where infer_from_prior.py resumes this prior unless told otherwise; does not change this run "
        "(default: it runs 3 of 10 steps differentially)",
    )
    group.add_argument(
        "--preview",
        action="store_true",
        help=f"show what each step points at as soon as it has run, in a small moving {PREVIEW_FILE}",
    )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="load no model, make nothing: print the priors as JSON lines, with forwards and disk, and say "
        "the memory to expect and what would be downloaded",
    )
    group.add_argument(
        "--save_decoded_videos", action="store_true", help="also a video of each step's denoised estimate"
    )


# --- what the flags ask for ---------------------------------------------------------------------------------


def read_prior_choices(args: argparse.Namespace) -> PriorChoices:
    """What the flags ask of the run, refused before anything heavy is imported if no run could use it.

    Raises:
        InputError: with the flag that is wrong.
    """
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(PriorChoices)}
    choices = PriorChoices(**given | {"seed": args.seed[0]})
    check_prior_choices(choices)
    family = FAMILIES[family_name(args.model, args.model_dir)]
    has_image = args.image is not None or args.download_example
    check_images(args.model, family, image=has_image, end_image=args.end_image is not None)
    if args.preview and not has_image:
        raise InputError("--preview takes its colours from an image, and there is none: leave it out")
    if args.denoising_strength < 1 and args.input_video is None:
        raise InputError(
            f"--denoising_strength {args.denoising_strength} starts from a video: give --input_video"
        )
    if args.input_video is not None and args.denoising_strength == 1:
        raise InputError(
            "--input_video is not used at --denoising_strength 1: give a strength below 1, 0.7 say"
        )
    for run_id in args.run_id or ():
        check_run_id(args.output_dir, run_id, but_priors=True)
    return choices


def read_input_video(args: argparse.Namespace, settings: RunSettings) -> list[Image] | None:
    """The frames of the input video, for --denoising_strength below 1."""
    if args.input_video is None:
        return None
    sizes = {"width": settings.width, "height": settings.height, "num_frames": settings.num_frames}
    return read_video(args.input_video, **sizes)
