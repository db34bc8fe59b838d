"""The flags of infer_from_prior.py alone; cli/flags.py has the shared ones and the argparse types."""

from __future__ import annotations

import argparse
from pathlib import Path

from step_skip.cli import flags, prompts
from step_skip.infer.choices import FIXED
from step_skip.method.closeness import CLOSENESS, DEFAULT_CLOSENESS
from step_skip.method.formation import DEFAULT_TEXT_SHARE
from step_skip.prior.schema import FORMATION_FILE


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the steps that run."""
    group = parser.add_argument_group(
        "steps",
        "At most one of --start_step, --steps, --num_steps and --sigmas. By default a clip is a\n"
        "differential resume in 3 of 10 steps.",
    )
    method = group.add_mutually_exclusive_group()
    method.add_argument(
        "--start_step",
        type=flags.start_steps,
        nargs="+",
        action="extend",
        metavar="N",
        help="Load the prior's latents after this step, counted from 0, and run the steps that follow. With "
        "an early step the prompt has more influence, with a late one the clip costs less; after the last "
        "step the clip is only decoded. auto: the latest step that leaves the text enough influence, see "
        "--text_share. Several steps, 2 4 6, or a range, 2-8 for 2 to 8, are a sweep with a clip for each. "
        "(default: the --start_step of generate_prior.py, if one was given; for an older prior step 6 of 10)",
    )
    method.add_argument(
        "--steps",
        type=flags.non_negative_int,
        nargs="+",
        metavar="N",
        help="Differential resume: run only these steps, and between them follow the prior's path, changed "
        "by the new prompt. (default: 0 6 9 of 10 steps; of 14 steps or more, 4)",
    )
    method.add_argument(
        "--num_steps",
        type=flags.numbers_of_steps,
        nargs="+",
        action="extend",
        metavar="N",
        help="Differential resume in N steps. They are denser toward the end, where the noise falls fastest: "
        "of 10 steps, 2 are 0 8, 3 are 0 6 9, 4 are 0 4 7 9. 1, 2, 3, 4 and 6 steps take 1, 3, 5, 7 and 11 "
        "forwards; 6 come near to a full run, 1 is enough for the motion of a mouth. auto: after the first "
        "step, as few as are expected to reach --closeness. Several, 2 3 4, or a range, 2-4, are a sweep. "
        "(default: see --steps)",
    )
    method.add_argument(
        "--sigmas",
        type=flags.strength,
        nargs="+",
        metavar="X",
        help="Resume on a schedule of custom sigmas, decreasing, where 1 is pure noise. The clip begins on "
        "the prior's path at the first sigma: at its saved latents, or on the straight line between two of "
        "them, so that the noise in the latents matches the sigma that the network is given.",
    )
    group.add_argument(
        "--num_steps_after",
        type=flags.positive_int,
        metavar="N",
        help="With --start_step: run N steps from there to the end, spaced as in a full run. (default: the "
        "prior's remaining steps)",
    )
    group.add_argument(
        "--closeness",
        type=flags.closeness,
        metavar="X",
        help="With --num_steps auto: how near the clip is to come to a full run, as PSNR in dB or as "
        f"{', '.join(f'{name} ({decibels:g})' for name, decibels in CLOSENESS.items())}. The prediction is "
        f"fitted to the embedded model. (default: {DEFAULT_CLOSENESS})",
    )
    group.add_argument(
        "--text_share",
        type=flags.strength,
        metavar="X",
        help="With --start_step auto: the share of the text's whole influence on the prior's run, above 0 "
        f"and at most 1, that has to remain after the step; the prior's {FORMATION_FILE} shows it. "
        f"(default: {DEFAULT_TEXT_SHARE})",
    )


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that describe what the new clip shows."""
    group = parser.add_argument_group("prompt")
    group.add_argument(
        "--prompt",
        type=flags.utf8_text,
        nargs="+",
        action="extend",
        metavar="TEXT",
        help="The new motion. Several prompts, each quoted, are a sweep. (default: the prior's own prompt)",
    )
    group.add_argument(
        "--prompts_file",
        type=Path,
        metavar="FILE",
        help="Text file with more prompts, one per line. A line that begins with # is a comment. A line that "
        "begins with { is a JSON object, which sets options of its own clips: "
        '{"prompt": "she speaks", "cfg_scale": 3, "start_step": "2-4"}. '
        f"Its keys are {', '.join(prompts.OVERRIDES)}.",
    )
    group.add_argument(
        "--negative_prompt",
        type=flags.utf8_text,
        metavar="TEXT",
        help="What the clip is steered away from. (default: the prior's)",
    )
    group.add_argument(
        "--cfg_scale",
        type=flags.alternatives,
        nargs="+",
        metavar="X",
        help="How strongly the prompt is followed; 1 switches guidance off and halves the cost. One value, "
        "or one for each step that runs: 5 5 1 saves the second forward of the third step. Values separated "
        "by commas, 2,3, are a sweep. (default: the prior's)",
    )
    group.add_argument(
        "--cfg_scale_2",
        type=flags.positive_float,
        metavar="X",
        help="The cfg_scale of the low-noise expert, for a model with two experts. (default: --cfg_scale if "
        "that is given, else the prior's)",
    )


def add_clip_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose what is written, and where."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        type=flags.utf8_path,
        metavar="FILE",
        help="The .mp4 file of a single clip. (default: a file in the prior's outputs folder, named after "
        "its steps and prompt)",
    )
    group.add_argument("--overwrite", action="store_true", help="Replace the file of --output if it exists.")
    group.add_argument(
        "--output_dir",
        type=flags.utf8_path,
        metavar="DIR",
        help="The folder of a sweep. Complete clips in it are not made again. (default: a folder in the "
        "first prior's outputs folder, named after all choices)",
    )
    group.add_argument(
        "--fps",
        type=flags.limited("fps", float),
        metavar="X",
        help="Frames per second at which the clip is played; the number of frames is fixed by the prior. "
        "(default: the prior's)",
    )
    group.add_argument(
        "--redo_below",
        action=flags.Removed,
        help="use --num_steps auto --closeness X, which takes as many steps as each clip needs, in one run",
    )
    group.add_argument(
        "--preview",
        action="store_true",
        help="Show the denoised estimate of the last step that ran in a small moving .webp beside the clip, "
        "updated after each step.",
    )
    group.add_argument(
        "--save_prior",
        action="store_true",
        help="Also save the clip as a prior, beside the one that it follows. A variation of the clip then "
        "takes fewer steps than the clip did; it comes as near to a full run as the clip, not nearer.",
    )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="Load no model and make no clip. Print each clip as a line of JSON, with its forwards and the "
        "seconds to expect, estimated from the prior's run; log the memory to expect and what would be "
        "downloaded.",
    )


def add_checked_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags whose values have to equal the prior's."""
    group = parser.add_argument_group(
        "checked", "Values that are fixed by the prior; a value that differs from the prior's is refused."
    )
    group.add_argument(
        "--image", type=Path, metavar="FILE", help="Image of the identity; only an older prior needs it."
    )
    group.add_argument(
        "--num_inference_steps", type=flags.positive_int, metavar="N", help="Steps of the prior's full run."
    )
    group.add_argument(
        "--denoising_strength", type=flags.strength, metavar="X", help="Strength of the prior's run."
    )
    group.add_argument(
        "--sigma_shift", type=flags.positive_float, metavar="X", help="Shift of the prior's noise schedule."
    )
    fixed = {"seed": "Seed", "num_frames": "Number of frames", "height": "Height", "width": "Width"}
    for name in FIXED:
        flag = f"--{name}"
        text = f"{fixed[name]} of the prior; for another, make a prior with generate_prior.py {flag}."
        group.add_argument(flag, type=flags.limited(name, int), metavar="N", help=text)
