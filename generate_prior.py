"""Make a prior: one full run for an identity, with the latents of every step saved.

    python generate_prior.py --model tiny --image data/tiny_wan_i2v/inputs/mila.png
    python generate_prior.py --download_example
    python generate_prior.py --image photos --prompt "he stays still" "he speaks" --seed 0 1
    python generate_prior.py --resume prior_output/run_<id>

infer_from_prior.py then makes new clips of the same identity from the prior, in a fraction of the steps.

With several images, prompts or seeds, one prior is made of each combination; a folder stands for every image
in it. The model is loaded once. If an image can't be read, its priors fail, the others are made, and the exit
code is 1. The same command run again makes only the priors that are missing.

--stop_after ends a run early and leaves a draft of the prior. --resume finishes a draft or an interrupted run
from its last complete step, and makes damaged files again.

The last lines on stdout are the folders of the priors, one per line.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # during the imports, Ctrl-C ends the process without a traceback

import argparse
import functools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from step_skip.cli import flags, prior_flags
from step_skip.cli.prior_report import log_prior, logging_how_to_resume
from step_skip.cli.terminal import run_script
from step_skip.cluster.driver import connected
from step_skip.cluster.priors import PriorCluster
from step_skip.generate.plan import plan_prior
from step_skip.generate.resume import finish_prior, read_resumable
from step_skip.media.videos import fetch_example
from step_skip.models.machine import pick_device
from step_skip.models.weights import ROOT, family_name, model_defaults
from step_skip.pipeline.settings import RunSettings
from step_skip.prior.preview import check_previewable, preview_to
from step_skip.prior.prior import PREVIEW_FILE, Prior
from step_skip.sweep.make_priors import (
    Batch,
    PriorProcess,
    check_batch,
    log_cost,
    log_what_a_batch_takes,
    make_batch,
    plan_batch,
    report_failed_priors,
)
from step_skip.sweep.priors import describe_prior_job

if TYPE_CHECKING:
    from PIL.Image import Image

    from step_skip.pipeline.schedulers import ProgressCallback

log = logging.getLogger("step_skip")

EXAMPLE_IMAGE = ROOT / "data" / "examples" / "wan" / "input_image.jpg"
RESUME_FLAGS = {"--resume", "--model_dir", "--device", "--vram", "--preview"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and fill in the model's default dtype."""
    parser = flags.Parser(__doc__)
    prior_flags.add_identity_arguments(parser)
    prior_flags.add_run_arguments(parser)
    prior_flags.add_prior_output_arguments(parser)
    flags.add_cheaper_arguments(
        parser,
        lora_type=flags.lora_argument,
        lora_help="infer_from_prior.py uses the same LoRAs by default. (default: none)",
    )
    flags.add_model_arguments(
        parser,
        model="I2V-480P",
        model_help="The model to run. tiny runs on a CPU, the others need a CUDA GPU.",
        dtype_help="Data type of the weights and the latents. (default: bfloat16; tiny: float32)",
    )
    flags.add_machine_arguments(parser, inherits=False)
    flags.add_cluster_arguments(parser, what="priors", reads="images")
    args = parser.parse_args(argv)
    flags.check_quotes(parser, argv, args.prompt)
    flags.check_cluster_arguments(parser, args)
    args.dtype = args.dtype or model_defaults(args.model, args.model_dir).dtype
    if args.resume is not None:
        settings = sorted(flags.given_flags(argv) - RESUME_FLAGS)
        if settings:
            parser.error(f"--resume takes every setting from the recorded run: leave out {settings[0]}")
    return args


def plan(args: argparse.Namespace) -> Batch:
    """Plan the requested priors without loading any weights.

    Raises:
        InputError: a flag is invalid, or no image can be used.
    """
    choices, family = prior_flags.read_prior_choices(args), family_name(args.model, args.model_dir)
    options = flags.options_of_flags(args)
    if args.download_example:
        here = replace(options, device=pick_device(options.model, options.device))
        plan_prior(here, choices, family=family)  # refuse a wrong flag before the download
        args.image = [fetch_example(EXAMPLE_IMAGE, root=ROOT)]
    return plan_batch(
        args.image or [],
        args.prompt,
        choices,
        options=options,
        family=family,
        output_dir=args.output_dir,
        end_images=args.end_image or [],
        seeds=args.seed,
        run_ids=args.run_id or [],
        is_here=args.ray is None,
    )


# --- making and finishing priors ----------------------------------------------------------------------------


def make_missing(args: argparse.Namespace, batch: Batch) -> None:
    """Make the priors that don't exist yet, on one loaded pipeline or on a cluster."""

    @functools.lru_cache(maxsize=1)
    def read_video(settings: RunSettings) -> list[Image] | None:
        return prior_flags.read_input_video(args, settings)

    def report_made(prior: Prior, steps_run: int) -> None:
        log_prior(args, prior, steps_run, briefly=not batch.is_single)

    check_batch(batch, read_video=read_video)
    if args.ray is not None:
        with connected(args.ray, workers=args.workers) as cluster:
            machine = PriorCluster(cluster, args.device)
            make_batch(batch, machine, read_video=read_video, on_made=report_made)
        return
    begun: list[Path] = []
    with logging_how_to_resume(args, begun, several=not batch.is_single):
        make_batch(
            batch,
            PriorProcess(),
            read_video=read_video,
            on_begin=begun.append,
            on_made=report_made,
            callback=preview_in(begun) if args.preview else None,
        )


def resume(args: argparse.Namespace) -> Path:
    """Finish a prior that was interrupted, stopped or damaged, and return its folder.

    Raises:
        InputError: the prior can't be finished, or would differ from an uninterrupted run.
    """
    if args.preview:
        check_previewable(read_resumable(args.resume))
    begun: list[Path] = []
    with logging_how_to_resume(args, begun):
        prior, steps_run = finish_prior(
            args.resume,
            device=args.device,
            vram=args.vram,
            model_dir=args.model_dir,
            on_begin=begun.append,
            callback=preview_in(begun) if args.preview else None,
        )
    if steps_run is not None:
        log_prior(args, prior, steps_run)
    return prior.directory


def preview_in(begun: list[Path]) -> ProgressCallback:
    """Return a callback that writes the preview of the running prior, whose folder is the last in `begun`."""
    return lambda *step: preview_to(begun[-1], begun[-1] / PREVIEW_FILE)(*step)


# --- the report ---------------------------------------------------------------------------------------------


def describe_priors(args: argparse.Namespace, batch: Batch) -> Iterator[str]:
    """Yield the folder of each prior, or in a dry run its line of JSON; then report the failures.

    Raises:
        RunError: some priors could not be made.
    """
    for job in batch.jobs:
        if args.dry_run or job.error is None:
            yield describe_prior_job(job) if args.dry_run else str(job.directory)
    report_failed_priors(batch.jobs, folder=None if args.dry_run else args.output_dir)


def main(argv: list[str] | None = None) -> str | Iterable[str]:
    """Make or finish priors and return their folders, one per line; in a dry run, a line of JSON for each."""
    args = parse_args(argv)
    if args.resume is not None:
        return str(resume(args))
    batch = plan(args)
    log_cost(batch)
    if args.dry_run:
        log_what_a_batch_takes(batch)
    elif batch.missing:
        make_missing(args, batch)
    lines = describe_priors(args, batch)
    return "".join(lines) if batch.is_single else lines


def command() -> None:
    """Run the console script of an installed package."""
    run_script(main)


if __name__ == "__main__":
    command()
