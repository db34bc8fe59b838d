"""The flags of infer_from_prior.py alone; flags.py has those of both scripts, and their types."""

from __future__ import annotations

import argparse
from pathlib import Path

from step_skip.cli import flags, prompts
from step_skip.infer.choices import FIXED
from step_skip.method.closeness import CLOSENESS, DEFAULT_CLOSENESS
from step_skip.method.formation import DEFAULT_TEXT_SHARE
from step_skip.prior.schema import FORMATION_FILE


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what chooses the steps that run."""
    group = parser.add_argument_group("steps, one of")
    method = group.add_mutually_exclusive_group()
    method.add_argument(
        "--start_step",
        type=flags.start_steps,
        nargs="+",
        action="extend",
        metavar="N",
        help="resume after this step; early: the prompt decides more, late: it costs less; the last step "
        "only decodes; an older prior is resumed after 6 of 10 unless told otherwise; several, as in "
        "--start_step 2 4 6, or a range, 2-8 for 2 to 8: a sweep, one video from each; auto: the latest step "
        "that leaves the text enough to say, see --text_share",
    )
    method.add_argument(
        "--steps",
        type=flags.non_negative_int,
        nargs="+",
        metavar="N",
        help="differential resume: run only these steps, spent on what the new prompt changes "
        "(default: 3 of 10, 0 6 9; 4 of 14 and more)",
    )
    method.add_argument(
        "--num_steps",
        type=flags.numbers_of_steps,
        nargs="+",
        action="extend",
        metavar="N",
        help="like --steps, so many, denser to the end where the noise falls fastest: of 10 steps 2 are 0 8, "
        "3 are 0 6 9, 4 are 0 4 7 9; 1, 2, 3, 4 and 6 steps are 1, 3, 5, 7 and 11 forwards; 6 come near "
        "to a full run, 1 is enough for a mouth; auto: after the first, as few as are expected to reach "
        "--closeness; several, 2 3 4 or 2-4: a sweep",
    )
    method.add_argument(
        "--sigmas",
        type=flags.strength,
        nargs="+",
        metavar="X",
        help="resume on custom sigmas (1 is noise); the schedule begins where "
        "the prior's path is at the first: at its saved latents, or between two of them on the straight line "
        "it took there, so that the latents are as noisy as the network is told",
    )
    group.add_argument(
        "--num_steps_after",
        type=flags.positive_int,
        metavar="N",
        help="with --start_step: N steps from there to the end, spaced as a full run's, not those left",
    )
    group.add_argument(
        "--closeness",
        type=flags.closeness,
        metavar="X",
        help=f"with --num_steps auto: how near to a full run, {', '.join(CLOSENESS)} or PSNR in dB, as "
        f"measured on the embedded model (default: {DEFAULT_CLOSENESS})",
    )
    group.add_argument(
        "--text_share",
        type=flags.strength,
        metavar="X",
        help="with --start_step auto: the share of all the text had to say in the prior's run that has to be "
        f"left, as the prior's {FORMATION_FILE} shows it (default: {DEFAULT_TEXT_SHARE})",
    )


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the new video shows."""
    group = parser.add_argument_group("prompt")
    group.add_argument(
        "--prompt",
        type=flags.utf8_text,
        nargs="+",
        action="extend",
        metavar="TEXT",
        help="the new motion (default: the prior's own prompt); several, each quoted: a sweep",
    )
    group.add_argument(
        "--prompts_file",
        type=Path,
        metavar="FILE",
        help="more prompts, one per line; # begins a comment; a line that begins with { is JSON and may set "
        'what holds for it alone: {"prompt": "she speaks", "cfg_scale": 3, "start_step": "2-4"}; it knows '
        f"{', '.join(prompts.OVERRIDES)}",
    )
    group.add_argument(
        "--negative_prompt",
        type=flags.utf8_text,
        metavar="TEXT",
        help="what to steer away from (default: the prior's)",
    )
    group.add_argument(
        "--cfg_scale",
        type=flags.alternatives,
        nargs="+",
        metavar="X",
        help="how strongly the prompt is followed; 1 switches guidance off and halves the cost; one, or one "
        "for each step that runs: 5 5 1 drops the second forward of the third; between commas, 2,3: a sweep "
        "(default: the prior's)",
    )
    group.add_argument(
        "--cfg_scale_2",
        type=flags.positive_float,
        metavar="X",
        help="of two experts the low-noise one's (default: --cfg_scale, where given, else the prior's)",
    )


def add_clip_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where the videos go."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        type=flags.utf8_path,
        metavar="FILE",
        help="the .mp4 (default: one in the prior's outputs folder, named after steps and prompt)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    group.add_argument(
        "--output_dir",
        type=flags.utf8_path,
        metavar="DIR",
        help="the folder of a sweep; whole videos in it are not made again (default: one in the first "
        "prior's outputs folder, named after all choices)",
    )
    group.add_argument(
        "--fps",
        type=flags.limited("fps", float),
        metavar="X",
        help="frames per second it is played at; their number is fixed by the prior (default: the prior's)",
    )
    group.add_argument(
        "--redo_below",
        action=flags.Removed,
        help="--num_steps auto --closeness X takes as many steps as each clip needs, in one run",
    )
    group.add_argument(
        "--preview",
        action="store_true",
        help="show what each step points at as soon as it has run, in a small moving .webp beside the video",
    )
    group.add_argument(
        "--save_prior",
        action="store_true",
        help="make the clip a prior, too, beside the one it follows: a variation of it can be had in fewer "
        "steps than it took, and comes as near to a full run as it did, not nearer",
    )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="load no model, make nothing: print the videos as JSON lines, with forwards and the seconds to "
        "expect from what the prior took; say the memory to expect and what would be downloaded",
    )


def add_checked_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can only be what it is in the prior."""
    group = parser.add_argument_group("checked", "refused unless it equals the prior's")
    group.add_argument(
        "--image", type=Path, metavar="FILE", help="picture of the identity; an older prior needs it"
    )
    group.add_argument("--num_inference_steps", type=flags.positive_int, metavar="N")
    group.add_argument("--denoising_strength", type=flags.strength, metavar="X")
    group.add_argument("--sigma_shift", type=flags.positive_float, metavar="X")
    for name in FIXED:
        flag = f"--{name}"
        group.add_argument(
            flag, type=flags.limited(name, int), metavar="N", help=f"another needs another prior: its {flag}"
        )
