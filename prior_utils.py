"""What the scripts share, for whoever has a prior in hand: save, load, verify, check the schedule.

    python prior_utils.py prior_output/run_*          # looks at every file and says what is still usable
    python prior_utils.py list                        # those in prior_output: name, prompt, steps, clips
    python prior_utils.py show prior_output/run_mila
    python prior_utils.py prune prior_output/run_*    # what could go of them; with --yes it goes
    python prior_utils.py rm prior_output/run_mila    # likewise, all of it
    python prior_utils.py export prior_output/run_mila --step 6    # its latents as a .latent of ComfyUI
    python prior_utils.py import latents/*.latent     # a run that was made there, as a prior

The names here stay; the parts they come from are in step_skip.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable
from pathlib import Path

from step_skip import comfyui
from step_skip.cli import flags
from step_skip.cli.manage import list_priors, remove_priors, show_prior
from step_skip.cli.terminal import run_script
from step_skip.errors import InputError, RunError
from step_skip.files.reading import sha256_file
from step_skip.files.tensors import DTYPES, sha256_tensor
from step_skip.files.writing import replacing, write_json
from step_skip.pipeline.settings import RunSettings
from step_skip.prior import prune
from step_skip.prior.checks import check_schedule
from step_skip.prior.files import check_files, load_conditioning, load_denoised, load_latents
from step_skip.prior.metadata import FORMAT_VERSION, read_prior, read_run, sealed
from step_skip.prior.prior import (
    IMAGE_FILE,
    INITIAL_LATENTS_FILE,
    OUTPUT_FILE,
    Prior,
    context_file,
    identity_file,
    noise_pred_file,
    noise_pred_nega_file,
    step_file,
    step_ranges,
)
from step_skip.prior.schema import METADATA_FILE
from step_skip.prior.writer import PriorWriter

__all__ = [
    "DTYPES",
    "FORMAT_VERSION",
    "IMAGE_FILE",
    "METADATA_FILE",
    "OUTPUT_FILE",
    "InputError",
    "Prior",
    "PriorWriter",
    "RunError",
    "RunSettings",
    "check_files",
    "check_schedule",
    "load_conditioning",
    "load_denoised",
    "load_latents",
    "noise_pred_file",
    "read_prior",
    "read_run",
    "replacing",
    "sealed",
    "sha256_file",
    "sha256_tensor",
    "step_file",
    "verify",
    "write_json",
]

log = logging.getLogger("step_skip")

COMMANDS = {  # by the first word; without one of them priors are verified
    "list": "List priors: name, prompt, steps, size on disk, clips made from them.",
    "show": "Show what a prior holds, and the clips made from it.",
    "rm": "Remove priors with the clips in their outputs; says what would go unless --yes is given.",
}


def verify(directories: Iterable[Path]) -> str:
    """Check every file of priors: SHA-256, shape, dtype, finite values; tell it file by file.

    Returns:
        The folders, one a line.

    Raises:
        InputError: something is damaged, or is no prior; all the others were looked at, too.
    """
    directories = list(directories)
    damaged, unreadable = 0, 0
    for directory in directories:
        try:
            prior = read_prior(directory)
        except InputError as error:
            if len(directories) == 1:
                raise
            log.info(str(error))
            unreadable += 1
            continue
        problems = find_problems(prior)
        for problem in problems.values():
            log.info(problem)
        total = len(recorded_files(prior))
        whole = f"{total - len(problems)} of {total} files are whole"
        log.info(f"{prior.directory}: {whole}; {usable(prior, problems)}")
        damaged += len(problems)
    if unreadable:
        raise InputError(
            f"{unreadable} of {len(directories)} priors cannot be read and {damaged} files are damaged, see "
            "above; copy them again or make them again"
        )
    if damaged:
        raise InputError(
            f"{damaged} files are damaged, see above; copy the prior again, or make good what can be made "
            "again with generate_prior.py --resume"
        )
    return "\n".join(map(str, directories))


def recorded_files(prior: Prior) -> list[str]:
    """The files a prior consists of, besides its metadata."""
    if prior.is_legacy:
        return [step_file(step) for step in range(prior.num_inference_steps)]
    return list(prior.metadata.files)


def find_problems(prior: Prior) -> dict[str, str]:
    """What is wrong with a prior's files, by name."""
    problems = {}
    for name in recorded_files(prior):
        try:
            if name.endswith(".pt"):
                is_latents = name.startswith(("step_", "noise_pred_", INITIAL_LATENTS_FILE))
                load = load_latents if is_latents else load_conditioning
                load(prior, name)
            else:
                check_files(prior, [name])
        except InputError as error:
            problems[name] = str(error)
    return problems


def usable(prior: Prior, problems: dict[str, str]) -> str:
    """What a prior can be used for without its damaged files."""
    if not prior.is_legacy and problems.keys() & set(own_conditioning(prior)):
        return "it can't be resumed with its own prompts"
    if prior.is_of_clip:
        steps = step_ranges(prior.kept_steps or [])
        return "it can't be followed" if problems else f"it can be followed at steps {steps}"
    resumable = [
        step
        for step in range(prior.num_inference_steps if prior.is_complete else prior.whole_steps)
        if (prior.is_legacy or prior.has(step_file(step)))
        and not problems.keys() & {step_file(step), noise_pred_nega_file(step + 1)}
    ]
    return f"it can be resumed after steps {step_ranges(resumable)}" if resumable else "it can't be resumed"


def own_conditioning(prior: Prior) -> list[str]:
    """The files of the prior's own encoded images and prompts."""
    prompts = [context_file(text) for text in prior.texts]
    return [*map(identity_file, prior.identity_names), *prompts]


def prune_priors(argv: list[str]) -> str:
    """Take out of priors what the chosen steps don't need, or say what that would be."""
    parser = flags.Parser(prune.__doc__ or "")
    parser.prog += " prune"
    parser.add_argument("prior_dir", type=flags.utf8_path, nargs="+", metavar="DIR", help="a run_<id> folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--num_steps",
        type=flags.positive_int,
        nargs="+",
        metavar="N",
        help="keep what infer_from_prior.py needs with these --num_steps (default: those that --num_steps "
        "auto chooses among, 1 2 3 4 6)",
    )
    which.add_argument(
        "--steps", type=flags.non_negative_int, nargs="+", metavar="N", help="keep what these --steps need"
    )
    parser.add_argument("--yes", action="store_true", help="remove it; without, only say what would go")
    args = parser.parse_args(argv)
    for directory in args.prior_dir:
        gone = prune.prune_prior(directory, num_steps=args.num_steps, steps=args.steps, dry_run=not args.yes)
        verb = "removed" if args.yes else "would remove"
        log.info(f"{directory}: {verb} {len(gone)} files, {sum(gone.values()) / 1e6:.1f} MB")
    if not args.yes:
        log.info(
            "nothing was changed; add --yes to remove it: what goes can only be made again by a full run"
        )
    return "\n".join(map(str, args.prior_dir))


def export_prior(argv: list[str]) -> str:
    """Write the latents after one of a prior's steps as a .latent, which ComfyUI's LoadLatent reads."""
    parser = flags.Parser(export_prior.__doc__ or "")
    parser.prog += " export"
    parser.add_argument("prior_dir", type=flags.utf8_path, metavar="DIR", help="a run_<id> folder")
    parser.add_argument(
        "--step", type=flags.non_negative_int, metavar="N", help="the step (default: the last, clean latents)"
    )
    output = "the file (default: run_<id>_step_<N>.latent, here)"
    parser.add_argument("--output", type=flags.utf8_path, metavar="FILE", help=output)
    args = parser.parse_args(argv)
    prior = read_prior(args.prior_dir)
    step = prior.num_inference_steps - 1 if args.step is None else args.step
    path = args.output or Path(f"run_{prior.metadata.run_id}_{Path(step_file(step)).stem}.latent")
    return str(comfyui.export_latents(prior, path, step=step))


def import_prior(argv: list[str]) -> str:
    """Make a prior of a run in ComfyUI: one .latent for each of its steps, by euler and simple."""
    parser = flags.Parser(import_prior.__doc__ or "")
    parser.prog += " import"
    files = "saved by SaveLatent after each step, in their order"
    parser.add_argument("latents", type=flags.utf8_path, nargs="+", metavar="FILE", help=files)
    parser.add_argument("--output_dir", type=flags.utf8_path, default=Path("prior_output"), metavar="DIR")
    parser.add_argument("--run_id", help="the folder's name is run_<run_id> (default: the first file's)")
    shift = "that of ModelSamplingSD3 there"
    parser.add_argument("--sigma_shift", type=flags.positive_float, default=5.0, help=shift)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="the model's here")
    args = parser.parse_args(argv)
    own = {name: getattr(args, name) for name in ("sigma_shift", "run_id", "dtype")}
    return str(comfyui.import_run(args.latents, args.output_dir, **own))


def parse_command(argv: list[str]) -> argparse.Namespace:
    """The words after one of COMMANDS."""
    parser = argparse.ArgumentParser(prog=f"prior_utils.py {argv[0]}", description=COMMANDS[argv[0]])
    if argv[0] == "list":
        place = "a prior, or a folder of priors (default: prior_output)"
        default = [Path("prior_output")]
        parser.add_argument("prior_dir", type=Path, nargs="*", default=default, metavar="DIR", help=place)
    else:
        parser.add_argument("prior_dir", type=Path, nargs="+", metavar="DIR", help="a run_<id> folder")
    if argv[0] == "rm":
        parser.add_argument("--yes", action="store_true", help="remove them; without it nothing is removed")
    return parser.parse_args(argv[1:])


def main(argv: list[str] | None = None) -> str:
    """List, show, remove, prune, export or import priors, or verify them, as infer_from_prior.py --verify."""
    argv = sys.argv[1:] if argv is None else argv
    with_parsers = {"prune": prune_priors, "export": export_prior, "import": import_prior}
    if argv and argv[0] in with_parsers:
        return with_parsers[argv[0]](argv[1:])
    if argv and argv[0] in COMMANDS:
        args = parse_command(argv)
        if argv[0] == "rm":
            return remove_priors(args.prior_dir, sure=args.yes)
        if argv[0] == "list":
            return list_priors(args.prior_dir)
        return "\n\n".join(map(show_prior, args.prior_dir))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prior_dir", type=Path, nargs="+", metavar="DIR", help="a run_<id> folder")
    return verify(parser.parse_args(argv).prior_dir)


if __name__ == "__main__":
    run_script(main)
