"""Make a prior: one full run for an identity, with the latents of every step kept.

    python generate_prior.py --model tiny --image data/tiny_wan_i2v/inputs/mila.png
    python generate_prior.py --download_example
    python generate_prior.py --image photos --prompt "he stays still" "he speaks" --seed 0 1
    python generate_prior.py --resume prior_output/run_<id>

infer_from_prior.py then makes new videos of the same identity from it, in a fraction of the steps.
A folder is every image in it. All share one loading of the model, an image that can't be read costs its own
priors, and the same command again makes only what is missing. Stopped after a step, a prior is a draft with a
preview.
--resume goes on after the last whole step of a run that was interrupted or stopped, and makes again what was
damaged. The last lines on stdout are the priors' folders.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until all is imported: nothing is there yet to be told

import argparse
import functools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from step_skip.cli import flags, prior_flags
from step_skip.cli.prior_report import log_prior, saying_how_to_go_on
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
    """Parse the command line and fill in the model's own defaults."""
    parser = flags.Parser(__doc__)
    prior_flags.add_identity_arguments(parser)
    prior_flags.add_run_arguments(parser)
    prior_flags.add_prior_output_arguments(parser)
    flags.add_cheaper_arguments(
        parser, lora_type=flags.lora_argument, lora_help="resumed runs take the same unless told otherwise"
    )
    flags.add_model_arguments(
        parser,
        model="I2V-480P",
        model_help="tiny runs on a CPU, the others need CUDA",
        dtype_help="(default: bfloat16; tiny: float32)",
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
            parser.error(f"--resume takes every setting from its run: leave out {settings[0]}")
    return args


def plan(args: argparse.Namespace) -> Batch:
    """Plan the priors that were asked for. No weight is loaded.

    Raises:
        InputError: a flag that no run could use, or no image can be used.
    """
    choices, family = prior_flags.read_prior_choices(args), family_name(args.model, args.model_dir)
    options = flags.options_of_flags(args)
    if args.download_example:
        here = replace(options, device=pick_device(options.model, options.device))
        plan_prior(here, choices, family=family)  # a wrong flag comes before the download
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
    with saying_how_to_go_on(args, begun, several=not batch.is_single):
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
        InputError: it can't be finished as the run that was begun would have.
    """
    if args.preview:
        check_previewable(read_resumable(args.resume))
    begun: list[Path] = []
    with saying_how_to_go_on(args, begun):
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
    """What writes the preview of a prior; by the time a step has run its folder is the last of these."""
    return lambda *step: preview_to(begun[-1], begun[-1] / PREVIEW_FILE)(*step)


# --- what the user is told ----------------------------------------------------------------------------------


def describe_priors(args: argparse.Namespace, batch: Batch) -> Iterator[str]:
    """Yield the folder of each prior, in a dry run a line of JSON for each; then report what failed.

    Raises:
        RunError: some could not be made.
    """
    for job in batch.jobs:
        if args.dry_run or job.error is None:
            yield describe_prior_job(job) if args.dry_run else str(job.directory)
    report_failed_priors(batch.jobs, folder=None if args.dry_run else args.output_dir)


def main(argv: list[str] | None = None) -> str | Iterable[str]:
    """Make or finish priors and return their folders, one a line; in a dry run a line of JSON for each."""
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
