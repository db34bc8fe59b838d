"""Make new videos of a prior's identity, in a fraction of the steps.

    python infer_from_prior.py --prior_dir prior_output/run_<id> --prompt "she speaks"
    python infer_from_prior.py --prior_dir prior_output/run_<id> --prompt "she speaks" --start_step 6
    python infer_from_prior.py --prior_dir prior_output/run_* --prompts_file prompts.txt --start_step 2-8

The first runs 3 of 10 steps, spread over the schedule and spent on what the new prompt changes: a
differential resume. The second loads the latents after step 6 and runs 7, 8, 9: late for a new motion.
Without --prompt the prior's own prompt is used, and the video is the prior's own, bit for bit.
The third is a sweep: every prior x prompt x start step, with the model loaded once; interrupted, the same
command goes on where it stopped. The last line on stdout is the video, or the sweep's folder; a .json file
beside each video says how it was made.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until all is imported: nothing is there yet to be told

import argparse
import contextlib
import functools
import itertools
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import prior_utils
from step_skip.cli import clip_flags, flags, prompts
from step_skip.cli.like import take_over
from step_skip.cli.terminal import run_script
from step_skip.cluster.clips import run_on_cluster
from step_skip.cluster.driver import Cluster, connected
from step_skip.errors import InputError, RunError
from step_skip.files.writing import check_folder
from step_skip.infer.as_prior import check_clip_prior
from step_skip.infer.choices import AUTO
from step_skip.infer.plan import settings_of
from step_skip.infer.warnings import doubts_of, warn_of_old_motion, warn_of_words, what_differs
from step_skip.media.videos import video_bytes
from step_skip.models.families import MODELS
from step_skip.models.loading import loaded_first
from step_skip.models.lora import describe_loras, distilled_hint, find_recorded_loras, parse_recorded_loras
from step_skip.models.lora_file import Lora
from step_skip.models.machine import pick_device
from step_skip.models.memory import check_download, say_what_each_mode_takes
from step_skip.models.weights import LoadOptions, model_defaults
from step_skip.page.page import running_page, write_page
from step_skip.prior.preview import check_previewable
from step_skip.prior.prior import bytes_of_prior
from step_skip.sweep.clips import Group, all_jobs, by_weights, make_groups
from step_skip.sweep.cost import components_to_load, describe_clip_job, summarize_jobs
from step_skip.sweep.finished import find_made, settle_single
from step_skip.sweep.make_clips import check_first, load_options, run_jobs
from step_skip.sweep.outputs import sweep_folder
from step_skip.sweep.progress import (
    report_failed_clips,
    say_what_auto_means,
    say_what_is_left_out,
    say_what_runs,
)

log = logging.getLogger("step_skip")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; what is left out is taken from the prior later."""
    parser = flags.Parser(__doc__)
    parser.add_argument(
        "--prior_dir",
        type=flags.utf8_path,
        nargs="+",
        action="extend",
        metavar="DIR",
        help="a run_<id> folder of generate_prior.py; several: a sweep over identities, or with --nearest "
        "priors of one identity to choose from",
    )
    parser.add_argument(
        "--nearest",
        action="store_true",
        help="of the priors with the same image, size, seed and settings let each video follow the one that "
        "is nearest to its prompt, by the first step's velocity, which costs nothing; make them with "
        "generate_prior.py --image FILE --prompt TEXT TEXT ...",
    )
    parser.add_argument(
        "--like",
        type=flags.utf8_path,
        metavar="FILE",
        help="a clip's .json or .mp4: make it again, or with the flags you give another one",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="make nothing: check every file of the priors and say what is damaged and what is still usable",
    )
    clip_flags.add_method_arguments(parser)
    clip_flags.add_prompt_arguments(parser)
    flags.add_cheaper_arguments(
        parser,
        lora_type=flags.lora_strengths,
        lora_help="others than the prior's may be given, a distilled one for example; --lora alone: none; "
        "strengths between commas, PATH:0.5,1: a sweep (default: the prior's)",
    )
    clip_flags.add_clip_output_arguments(parser)
    clip_flags.add_checked_arguments(parser)
    flags.add_model_arguments(
        parser,
        model=None,
        model_help="(default: the prior's; any other is refused)",
        dtype_help="(default: the prior's; any other is refused)",
    )
    flags.add_machine_arguments(parser, inherits=True)
    flags.add_cluster_arguments(parser, what="videos", reads="priors")
    args = parser.parse_args(argv)
    given = flags.given_flags(argv)
    if args.prior_dir is None and args.like is None:
        parser.error("the following arguments are required: --prior_dir, or --like")
    others = sorted(given - {"--prior_dir", "--verify"})
    if args.verify and others:
        parser.error(f"--verify only looks at priors: leave out {others[0]}")
    flags.check_quotes(parser, argv, args.prompt)
    flags.check_cluster_arguments(parser, args)
    if args.ray is not None and args.save_prior:
        parser.error("--save_prior needs steps that the workers of --ray don't give back: leave it out")
    if args.overwrite and args.output is None:
        parser.error("--overwrite replaces what --output names: give --output")
    if args.like is not None:
        take_over(args, given)
    may_be_auto = args.prompts_file is not None or any(AUTO in each for each in args.start_step or ())
    if args.text_share is not None and not may_be_auto:
        parser.error("--text_share is what --start_step auto goes by: give that, too")
    return args


# --- the run ------------------------------------------------------------------------------------------------


def find_loras(groups: Sequence[Group]) -> tuple[Lora, ...]:
    """The LoRAs that priors record; their videos' JSON describes them as they are applied now.

    Raises:
        InputError: see `find_recorded_loras`.
    """
    loras = find_recorded_loras(groups[0].jobs[0].plan.lora)
    described = describe_loras(loras)
    for job in all_jobs(groups):
        if job.plan.lora != described:
            job.plan = replace(job.plan, lora=described)
    return loras


def prepare(
    groups: Sequence[Group], args: argparse.Namespace, cluster: Cluster | None
) -> tuple[LoadOptions, dict[Path, Exception]]:
    """Check what can be before weights are loaded, of priors that need the same; and say what is doubtful.

    Returns:
        What to load; and by video what is wrong with the first priors.

    Raises:
        InputError: the device, the LoRAs or all of the priors can't be used.
    """
    jobs = all_jobs(groups)
    model = jobs[0].plan.model
    device = pick_device(model, args.device) if cluster is None else cluster.device(model, args.device)
    loras = find_loras(groups) if args.lora is None else parse_recorded_loras(jobs[0].plan.lora)
    doubts: list[str] = []
    for plan, prior in ((group.plans[0], group.prior) for group in groups):
        doubts += doubts_of(plan, prior, device=device) if cluster is None else ()
        doubts += what_differs(plan, prior)
    for doubt in dict.fromkeys(doubts):
        log.warning(doubt)
    warn_of_old_motion((job.plan, job.prior) for job in jobs)
    dtype, failed = check_first(groups)
    guided = args.lora and any(job.plan.cfg_scale != 1 for job in jobs)
    if guided and (hint := distilled_hint(loras)):
        log.info(hint)
    options = load_options(
        groups, device=device, dtype=dtype, vram=args.vram, model_dir=args.model_dir, loras=loras
    )
    warn_of_words({text: group.prior for group in groups for text in group.texts}, options)
    return options, failed


def make_videos(
    groups: Sequence[Group],
    args: argparse.Namespace,
    cluster: Cluster | None = None,
    *,
    there: int | None,
    contexts: Path | None,
    order: Sequence[str] = (),
) -> dict[Path, Exception]:
    """Load one model after the other and make its videos; returns the errors of jobs that failed.

    Args:
        cluster: on whose workers; None: in this process.
        there: the videos of a sweep that are there already; None: no sweep, a single video.
        contexts: see `run_jobs`.
        order: the names of all videos of a sweep, as they were asked for.

    Raises:
        InputError, RunError: none of the priors could be used, or no model could be loaded.
    """
    jobs, batches = all_jobs(groups), by_weights(groups)
    folder = jobs[0].folder
    failed: dict[Path, Exception] = {}
    told = False
    for batch in batches:
        try:
            options, unusable = prepare(batch, args, cluster)
            failed |= unusable
            usable = [group for group in batch if group.jobs[0].path not in unusable]
            if not told:
                firsts = [(group, settings_of(group.jobs[0].plan, group.prior)) for group in groups]
                check_folder(
                    folder, sum(len(group.jobs) * video_bytes(own.size) for group, own in firsts) + 2**20
                )
                say_what_runs(groups, there=there)
                told = True
            run = run_jobs if cluster is None else functools.partial(run_on_cluster, cluster=cluster)
            if there is None:
                failed |= run(usable, options=options)
                continue
            with sweep_folder(folder), running_page(folder, order) as on_made:
                failed |= run(usable, options=options, contexts=contexts, on_made=on_made)
        except (InputError, RunError) as error:
            if len(batches) == 1:
                raise
            failed |= {job.path: error for job in all_jobs(batch)}
    return failed


def on_cluster(args: argparse.Namespace) -> contextlib.AbstractContextManager[Cluster | None]:
    """The cluster of --ray; None without it."""
    return contextlib.nullcontext() if args.ray is None else connected(args.ray, workers=args.workers)


def dry_run(groups: Sequence[Group], args: argparse.Namespace, *, there: int, contexts: Path | None) -> None:
    """Say what the jobs that are left would take: time, memory, what would be loaded and downloaded."""
    batches = by_weights(groups)
    needed = [components_to_load(batch, contexts) for batch in batches]
    loaded = ", ".join(dict.fromkeys(itertools.chain(*needed))) or "nothing"
    log.info(f"{summarize_jobs(all_jobs(groups))}; {there} are there already; would load {loaded}")
    for batch, components in zip(batches, needed, strict=True):
        plan = batch[0].jobs[0].plan
        device = "cuda" if plan.model in MODELS else "cpu"  # also where there is none
        device = device if args.device is None else pick_device(plan.model, args.device)
        dtype = plan.dtype or model_defaults(plan.model, args.model_dir).dtype
        loras = parse_recorded_loras(plan.lora)
        options = load_options(
            batch, device=device, dtype=dtype, vram=args.vram, model_dir=args.model_dir, loras=loras
        )
        check_download(options, components)
        say_what_each_mode_takes(options, loaded_first(components))


def main(argv: list[str] | None = None) -> Path | str | Iterable[str]:
    """Make one video and return its path, or a sweep of them and return its folder."""
    args = parse_args(argv)
    if args.verify:
        return prior_utils.verify(args.prior_dir)
    is_sweep = args.prompts_file is not None or args.output_dir is not None
    groups, left_out = make_groups(
        args.prior_dir,
        prompts.read_choices(args),
        output=args.output,
        output_dir=args.output_dir,
        overwrite=args.overwrite,
        is_sweep=is_sweep,
        nearest=args.nearest,
    )
    jobs = all_jobs(groups)
    is_sweep = is_sweep or len(jobs) > 1 or bool(left_out)
    say_what_is_left_out(left_out)
    for job in jobs if args.preview else ():
        check_previewable(job.prior)
        job.preview = True
    if args.save_prior:
        if is_sweep:
            raise InputError("--save_prior is for one clip: a sweep's priors would be among those it sweeps")
        check_clip_prior(jobs[0].plan, jobs[0].prior)
        check_folder(jobs[0].prior.directory.parent, bytes_of_prior(jobs[0].prior))
        jobs[0].save_prior = True
    say_what_auto_means(groups)
    if not is_sweep:
        settle_single(groups[0], output=args.output, overwrite=args.overwrite)
    failed = {} if args.overwrite else find_made(groups)
    there = sum(job.made for job in jobs)
    folder = jobs[0].folder
    contexts = folder if is_sweep and len({id(group.prior) for group in groups}) > 1 else None
    to_do = list(jobs_left(groups, failed))
    if args.dry_run:
        dry_run(to_do, args, there=there, contexts=contexts)
        return map(describe_clip_job, jobs)
    if not is_sweep and there:
        log.info("made before, by the same choices, and whole: nothing to do")
    if to_do:
        order = [f"{job.name}.mp4" for job in jobs] if is_sweep else []
        with on_cluster(args) as cluster:
            failed |= make_videos(
                to_do, args, cluster, there=there if is_sweep else None, contexts=contexts, order=order
            )
    if not is_sweep:
        if failed:
            raise next(iter(failed.values()))
        if args.output not in (None, jobs[0].path):
            raise InputError(
                f"--output: another run made {args.output} meanwhile; this run's clip is {jobs[0].path}"
            )
        return jobs[0].path
    if not to_do and there:
        with sweep_folder(folder):
            write_page(folder, [f"{job.name}.mp4" for job in jobs])
    report_failed_clips(failed, len(jobs), folder=folder, left_out=left_out)
    return folder


def jobs_left(groups: Sequence[Group], failed: Collection[Path]) -> Iterator[Group]:
    """The groups with the jobs whose videos are still to be made."""
    for group in groups:
        if jobs := [job for job in group.jobs if not (job.made or (failed and job.path in failed))]:
            yield replace(group, jobs=jobs)


def command() -> None:
    """The console script of an installed package."""
    run_script(main)


if __name__ == "__main__":
    command()
