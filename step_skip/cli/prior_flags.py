"""The flags of generate_prior.py alone; cli/flags.py has the shared ones and the argparse types."""

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
    """Add the flags that describe the identity and what happens."""
    group = parser.add_argument_group("identity")
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--image",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="Image of the identity, the first frame of every clip. With several images, or a folder of any "
        "number, each image becomes a prior. T2V models take no image and make a prior of each --prompt "
        "instead; TI2V-5B works with or without one.",
    )
    source.add_argument(
        "--download_example", action="store_true", help="Download DiffSynth's example image and use it."
    )
    source.add_argument(
        "--resume",
        type=flags.utf8_path,
        metavar="RUN_DIR",
        help="Finish the prior in this folder. Its settings are recorded there, so only --model_dir, "
        "--device, --vram and --preview may be given, too.",
    )
    group.add_argument(
        "--end_image",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="Image of the last frame of every clip: FLF2V-14B needs one, Fun-1.3B-InP can use one. Give one "
        "for all images, or one for each.",
    )
    group.add_argument(
        "--prompt",
        type=flags.utf8_text,
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="What happens in the prior's own clip. A prompt that holds still, 'she stays still', serves "
        "most new prompts best; a prior to be resumed by --start_step is best without any prompt, a neutral "
        "prior. With several prompts, each image becomes a prior with each prompt; with as many prompts as "
        "image files, and no folder, each file has its own prompt. (default: no prompt)",
    )
    group.add_argument(
        "--negative_prompt",
        type=flags.utf8_text,
        metavar="TEXT",
        help="What the clip is steered away from. (default: Wan's usual negative prompt; tiny: none)",
    )
    group.add_argument(
        "--input_video",
        type=Path,
        metavar="FILE",
        help="Video to start from; needs --denoising_strength below 1. (default: start from noise)",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that fix schedule, noise and size."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--num_inference_steps",
        type=flags.positive_int,
        default=10,
        metavar="N",
        help="Steps of the full run.",
    )
    group.add_argument(
        "--sigma_shift",
        type=flags.positive_float,
        metavar="X",
        help="Shift of the noise schedule: the higher it is, the more of the schedule is spent at high "
        "noise. (default: 5)",
    )
    group.add_argument(
        "--denoising_strength",
        type=flags.strength,
        default=1.0,
        metavar="X",
        help="Above 0, at most 1. Below 1, the run starts from --input_video with less noise.",
    )
    group.add_argument(
        "--cfg_scale",
        type=flags.positive_float,
        metavar="X",
        help="How strongly the prompt is followed; 1 switches guidance off and halves the cost. "
        "(default: 5; tiny: 2)",
    )
    group.add_argument(
        "--cfg_scale_2",
        type=flags.positive_float,
        metavar="X",
        help="The cfg_scale of the low-noise expert, for a model with two experts. (default: --cfg_scale if "
        "that is given; T2V-A14B: 3)",
    )
    group.add_argument(
        "--switch_DiT_boundary",
        type=flags.strength,
        metavar="X",
        help="The sigma below which the second of two experts runs. (default: the model's own; I2V-A14B: "
        "0.9, T2V-A14B: 0.875)",
    )
    group.add_argument(
        "--stop_after",
        type=flags.non_negative_int,
        metavar="N",
        help="Stop after this step, counted from 0, and decode its denoised estimate. The prior is then a "
        "draft: infer_from_prior.py resumes it after this step or an earlier one, and --resume finishes it. "
        "(default: run all steps)",
    )
    group.add_argument(
        "--seed",
        type=flags.limited("seed", int),
        nargs="+",
        default=[PriorChoices.seed],
        metavar="N",
        help="Seed of the initial noise. With several seeds, each makes a prior. "
        f"(default: {PriorChoices.seed})",
    )
    sizes = parser.add_argument_group(
        "clip",
        "By default a clip has the image's aspect ratio at the model's area (480 x 832 pixels;\n"
        "I2V-720P: 720 x 1280) and 81 frames; tiny has 96 x 96 pixels and 17 frames. Sizes are rounded\n"
        "up to what the model can make.",
    )
    sizes.add_argument(
        "--fit",
        choices=FITS,
        default="crop",
        help="How an image with another aspect ratio than the clip's is fitted. crop: its middle is shown; "
        "pad: all of it is shown, on --background; stretch: all of it is shown, distorted.",
    )
    sizes.add_argument(
        "--background",
        default="white",
        metavar="COLOUR",
        help="Colour that shows where an image is transparent, and around it with --fit pad: a name or a "
        "value of CSS, white or #336699.",
    )
    for name, text in (
        ("height", "Height in pixels."),
        ("width", "Width in pixels."),
        ("num_frames", "Number of frames."),
    ):
        sizes.add_argument(f"--{name}", type=flags.limited(name, int), metavar="N", help=text)
    sizes.add_argument(
        "--fps",
        type=flags.limited("fps", float),
        metavar="X",
        help="Frames per second. (default: 16; tiny: 8)",
    )


def add_prior_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose where the prior is written, and what else is saved."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_dir",
        type=flags.utf8_path,
        default=Path("prior_output"),
        metavar="DIR",
        help="Folder in which the prior's own folder, run_<id>, is made.",
    )
    group.add_argument(
        "--run_id",
        nargs="+",
        metavar="ID",
        help="The id of the prior, of letters, digits, . _ and -; one for each prior. (default: after the "
        "image's name, mila, mila_2, ...; without an image, after the prompt. If a prior with such a name "
        "exists and has the same image, prompt, seed, settings and weights, it is not made again)",
    )
    group.add_argument(
        "--start_step",
        type=flags.non_negative_int,
        metavar="N",
        help="The step after which infer_from_prior.py resumes this prior by default; it does not change "
        "this run. (default: none; infer_from_prior.py then runs 3 of 10 steps differentially)",
    )
    group.add_argument(
        "--preview",
        action="store_true",
        help=f"Show the denoised estimate of the last step that ran in a small moving {PREVIEW_FILE} in the "
        "prior's folder, updated after each step.",
    )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="Load no model and make no prior. Print each prior as a line of JSON, with its forwards and the "
        "bytes it takes on disk; log the memory to expect and what would be downloaded.",
    )
    group.add_argument(
        "--save_decoded_videos",
        action="store_true",
        help="Also decode the denoised estimate of each step and save it as a clip.",
    )


# --- from flags to choices ----------------------------------------------------------------------------------


def read_prior_choices(args: argparse.Namespace) -> PriorChoices:
    """Return the choices that the flags make, and check them before torch is imported.

    Raises:
        InputError: names the flag that is wrong.
    """
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(PriorChoices)}
    choices = PriorChoices(**given | {"seed": args.seed[0]})
    check_prior_choices(choices)
    family = FAMILIES[family_name(args.model, args.model_dir)]
    has_image = args.image is not None or args.download_example
    check_images(args.model, family, image=has_image, end_image=args.end_image is not None)
    if args.preview and not has_image:
        raise InputError("--preview takes its colours from an image, and no image is given: leave it out")
    if args.denoising_strength < 1 and args.input_video is None:
        raise InputError(
            f"--denoising_strength {args.denoising_strength} starts from an input video: give --input_video"
        )
    if args.input_video is not None and args.denoising_strength == 1:
        raise InputError(
            "--input_video is not used at --denoising_strength 1: give a strength below 1, for example 0.7"
        )
    for run_id in args.run_id or ():
        check_run_id(args.output_dir, run_id, but_priors=True)
    return choices


def read_input_video(args: argparse.Namespace, settings: RunSettings) -> list[Image] | None:
    """Return the frames of the input video, for --denoising_strength below 1; None: there is none."""
    if args.input_video is None:
        return None
    sizes = {"width": settings.width, "height": settings.height, "num_frames": settings.num_frames}
    return read_video(args.input_video, **sizes)
