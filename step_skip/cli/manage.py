"""Manage priors: the subcommands of prior_utils.py. List, show, remove, verify, prune, export, import."""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from step_skip.cli import flags
from step_skip.cli.terminal import one_line
from step_skip.comfyui import export_latents, import_run
from step_skip.errors import InputError
from step_skip.files.tensors import DTYPES
from step_skip.files.writing import locked
from step_skip.media.images import crop_preview_file
from step_skip.prior import prune
from step_skip.prior.files import damaged_files, recorded_files
from step_skip.prior.metadata import read_prior, read_run
from step_skip.prior.prior import (
    IMAGE_FILE,
    OUTPUT_FILE,
    Prior,
    context_file,
    identity_file,
    noise_pred_nega_file,
    step_file,
    step_ranges,
)
from step_skip.prior.schema import METADATA_FILE

log = logging.getLogger(__name__)

COMMANDS = {  # by the first word; without one of them priors are verified
    "list": "List priors: name, prompt, steps, size on disk, clips made from them.",
    "show": "Show what a prior holds, and the clips made from it.",
    "rm": "Remove priors with the clips in their outputs; says what would go unless --yes is given.",
}

PROMPT_WIDTH = 40  # characters of a prompt in a list


def find_priors(folders: Iterable[Path]) -> list[Path]:
    """Return the folders that are priors and, sorted by name, the priors directly inside the others.

    Raises:
        InputError: a folder does not exist.
    """
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; name a prior, or a folder of priors")
        inside = sorted(path.parent for path in folder.glob(f"*/{METADATA_FILE}"))
        found += [folder] if (folder / METADATA_FILE).is_file() else inside
    return found


def list_priors(folders: Iterable[Path]) -> str:
    """Return a table of priors: name, prompt, steps, size, clips; warn of each that can't be read."""
    rows = [("name", "prompt", "steps", "size", "clips")]
    for directory in find_priors(folders):
        try:
            prior = read_run(directory)
        except InputError as error:
            log.warning(f"{directory} cannot be read: {error}")
            continue
        prompt = one_line(prior.metadata.prompt or "")
        short = prompt if len(prompt) <= PROMPT_WIDTH else f"{prompt[: PROMPT_WIDTH - 3]}..."
        rows.append(
            (directory.name, short, steps_of(prior), folder_size(directory), str(len(clips_of(directory))))
        )
    return table(rows) if len(rows) > 1 else "no prior there"


def show_prior(directory: Path) -> str:
    """Return what a prior holds, one entry per line.

    Raises:
        InputError: the prior can't be read.
    """
    prior, clips = read_run(directory), clips_of(directory)
    m, unknown = prior.metadata, "not recorded"
    shape = f"{m.width} x {m.height} pixels, {m.num_frames} frames"
    rows = [
        ("prior", str(directory)),
        ("prompt", unknown if m.prompt is None else m.prompt),
        ("image", prior.image_name or "not recorded"),
        ("model", m.model or unknown),
        ("made", m.created or unknown),
        ("steps", steps_of(prior)),
        ("video", shape),
        ("seed", unknown if m.seed is None else str(m.seed)),
        ("size", folder_size(directory)),
    ]
    for name, file in (
        ("thumbnail", IMAGE_FILE),
        ("cropped", crop_preview_file(IMAGE_FILE)),
        ("clip", OUTPUT_FILE),
    ):
        if (directory / file).is_file():
            rows.append((name, str(directory / file)))
    rows.append(("made from it", f"clips: {len(clips)}"))
    rows += [("", str(path)) for path in clips]
    return table([(name, one_line(value)) for name, value in rows])


def remove_priors(directories: Sequence[Path], *, sure: bool) -> str:
    """Remove priors with their clips and return their folders; unless `sure`, log what would be removed.

    Raises:
        InputError: a folder is not a prior's, or is being written.
    """
    for directory in directories:
        if directory.is_symlink() or not (directory / METADATA_FILE).is_file():
            raise InputError(f"{directory} is not a prior: it holds no {METADATA_FILE}; nothing was removed")
    for directory in directories:
        clips = len(clips_of(directory))
        what = f"{directory}: {folder_size(directory)}, and the clips made from it: {clips}"
        if not sure:
            log.info(f"would remove {what}")
            continue
        with locked(directory):  # no other process writes to it
            shutil.rmtree(directory)
        log.info(f"removed {what}")
    if not sure:
        log.info("nothing was removed; add --yes to remove it")
    return "\n".join(map(str, directories))


# --- entries of a table -------------------------------------------------------------------------------------


def steps_of(prior: Prior) -> str:
    """Return the number of steps that a prior holds, and "of" the total if some are missing."""
    total = prior.num_inference_steps
    if prior.kept_steps is not None:
        return f"{len(prior.kept_steps)} of {total}"
    return str(total) if prior.is_complete else f"{prior.whole_steps} of {total}"


def clips_of(directory: Path) -> list[Path]:
    """Return the clips in a prior's outputs folder."""
    return sorted((directory / "outputs").glob("**/*.mp4"))


def folder_size(directory: Path) -> str:
    """Return the size of a folder on disk, in MB; links are not followed."""
    files = (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    return f"{sum(path.stat().st_size for path in files) / 1e6:.1f} MB"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text, with columns separated by two spaces."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in padded)


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
        problems = damaged_files(prior, load=True)
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
    return str(export_latents(prior, path, step=step))


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
    return str(import_run(args.latents, args.output_dir, **own))


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
