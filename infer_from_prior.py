"""Make new videos of a prior's identity, in a fraction of the steps.

    python infer_from_prior.py --prior_dir prior_output/run_<id> --prompt "She looks up."
    python infer_from_prior.py --prior_dir prior_output/run_<id> --prompt "She looks up." --start_step 6
    python infer_from_prior.py --prior_dir prior_output/run_* --prompts_file prompts.txt --start_step 2-8

The first runs 3 of 10 steps, spread over the schedule and spent on what the new prompt changes: a
differential resume. The second loads the latents after step 6 and runs 7, 8, 9: late for a new motion.
Without --prompt the prior's own prompt is used, and the video is the prior's own, bit for bit.
The third is a sweep: every prior x prompt x start step, with the model loaded once; interrupted, the same
command goes on where it stopped. The last line on stdout is the video, or the sweep's folder; a .json file
beside each video says how it was made.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import prior_utils
from step_skip import cli, cli_machine
from step_skip.closeness import CLOSENESS, DEFAULT_CLOSENESS
from step_skip.families import MODELS
from step_skip.files import InputError, RunError, check_folder
from step_skip.infer import warn_of_what_differs
from step_skip.jobs import load_options, run_jobs
from step_skip.loading import differences_since, loaded_first, pick_device
from step_skip.lora import distilled_hint
from step_skip.media import video_bytes
from step_skip.memory import check_download, say_what_each_mode_takes
from step_skip.models import model_defaults
from step_skip.page import write_page
from step_skip.plan import AUTO, Plan, settings_of
from step_skip.prior import Prior
from step_skip.steps import DEFAULT_TEXT_SHARE, FORMATION_FILE, is_late
from step_skip.sweep import (
    Group,
    Job,
    all_jobs,
    components_to_load,
    describe_job,
    is_made,
    load_all_inputs,
    make_groups,
    read_all_inputs,
    summarize_jobs,
    sweep_folder,
)

log = logging.getLogger("step_skip")

# Clips of the embedded model that showed the new motion, resumed after 6 of 10, by the prior's kind; a full
# run: 100%. From benchmarks/results/promise/headline.md.
OBEYED_AFTER_6 = {"prompted": "14% (20% if its prior holds still)", "neutral": "69%"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; what is left out is taken from the prior later."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--prior_dir",
        type=cli.utf8_path,
        nargs="+",
        action="extend",
        required=True,
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
        "--verify",
        action="store_true",
        help="make nothing: check every file of the priors and say what is damaged and what is still usable",
    )
    add_method_arguments(parser)
    add_prompt_arguments(parser)
    cli.add_cheaper_arguments(
        parser,
        lora_help="others than the prior's may be given, a distilled one for example; --lora alone: none "
        "(default: the prior's)",
    )
    add_output_arguments(parser)
    add_checked_arguments(parser)
    cli.add_model_arguments(
        parser,
        model=None,
        model_help="(default: the prior's; any other is refused)",
        dtype_help="(default: the prior's; any other is refused)",
    )
    cli_machine.add_machine_arguments(parser, inherits=True)
    args = parser.parse_args(argv)
    others = sorted(cli.given_flags(argv) - {"--prior_dir", "--verify"})
    if args.verify and others:
        parser.error(f"--verify only looks at priors: leave out {others[0]}")
    if args.overwrite and args.output is None:
        parser.error("--overwrite replaces what --output names: give --output")
    may_be_auto = args.prompts_file is not None or [AUTO] in (args.start_step or ())
    if args.text_share is not None and not may_be_auto:
        parser.error("--text_share is what --start_step auto goes by: give that, too")
    return args


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what chooses the steps that run."""
    group = parser.add_argument_group("steps, one of")
    method = group.add_mutually_exclusive_group()
    method.add_argument(
        "--start_step",
        type=cli.start_steps,
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
        type=cli.non_negative_int,
        nargs="+",
        metavar="N",
        help="differential resume: run only these steps, spent on what the new prompt changes "
        "(default: 3 of 10, 0 6 9; 4 of 14 and more)",
    )
    method.add_argument(
        "--num_steps",
        type=cli.number_of_steps,
        metavar="N",
        help="like --steps, so many, denser to the end where the noise falls fastest: of 10 steps 2 are 0 8, "
        "3 are 0 6 9, 4 are 0 4 7 9; 1, 2, 3, 4 and 6 steps are 1, 3, 5, 7 and 11 forwards; 6 come near "
        "to a full run, 1 is enough for a mouth; auto: after the first, as few as are expected to reach "
        "--closeness",
    )
    method.add_argument(
        "--sigmas",
        type=cli.strength,
        nargs="+",
        metavar="X",
        help="resume on a schedule of your own (1 is noise), as a distilled LoRA wants it; it begins where "
        "the prior's path is at the first: at its saved latents, or between two of them on the straight line "
        "it took there, so that the latents are as noisy as the network is told",
    )
    group.add_argument(
        "--num_steps_after",
        type=cli.positive_int,
        metavar="N",
        help="with --start_step: N steps from there to the end, spaced as a full run's, not those left",
    )
    group.add_argument(
        "--closeness",
        type=cli.closeness,
        metavar="X",
        help=f"with --num_steps auto: how near to a full run, {', '.join(CLOSENESS)} or PSNR in dB, as "
        f"measured on the embedded model (default: {DEFAULT_CLOSENESS})",
    )
    group.add_argument(
        "--text_share",
        type=cli.strength,
        metavar="X",
        help="with --start_step auto: the share of all the text had to say in the prior's run that has to be "
        f"left, as the prior's {FORMATION_FILE} shows it (default: {DEFAULT_TEXT_SHARE})",
    )


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the new video shows."""
    group = parser.add_argument_group("prompt")
    group.add_argument(
        "--prompt",
        type=cli.utf8_text,
        nargs="+",
        action="extend",
        metavar="TEXT",
        help="the new motion (default: the prior's own prompt); several, each quoted: a sweep",
    )
    group.add_argument(
        "--prompts_file",
        type=Path,
        metavar="FILE",
        help="more prompts, one per line; a line that begins with { is JSON and may set what holds for it "
        'alone: {"prompt": "She nods.", "cfg_scale": 3, "start_step": "2-4"}; it knows '
        f"{', '.join(cli.OVERRIDES)}",
    )
    group.add_argument(
        "--negative_prompt",
        type=cli.utf8_text,
        metavar="TEXT",
        help="what to steer away from (default: the prior's)",
    )
    group.add_argument(
        "--cfg_scale",
        type=cli.positive_float,
        nargs="+",
        metavar="X",
        help="how strongly the prompt is followed; 1 switches guidance off and halves the cost; one, or one "
        "for each step that runs: 5 5 1 drops the second forward of the third (default: the prior's)",
    )
    group.add_argument(
        "--cfg_scale_2",
        type=cli.positive_float,
        metavar="X",
        help="of two experts the low-noise one's (default: --cfg_scale, where given, else the prior's)",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where the videos go."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        type=cli.utf8_path,
        metavar="FILE",
        help="the .mp4 (default: one in the prior's outputs folder, named after steps and prompt)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    group.add_argument(
        "--output_dir",
        type=cli.utf8_path,
        metavar="DIR",
        help="the folder of a sweep; whole videos in it are not made again (default: one in the first "
        "prior's outputs folder, named after all choices)",
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
    group.add_argument("--num_inference_steps", type=cli.positive_int, metavar="N")
    group.add_argument("--denoising_strength", type=cli.strength, metavar="X")
    group.add_argument("--sigma_shift", type=cli.positive_float, metavar="X")


# --- what the user is told ----------------------------------------------------------------------------------


def warn_of_old_motion(groups: Sequence[Group]) -> None:
    """Say so where a new prompt comes too late to be obeyed: motion is settled early."""
    starts = ((late_start(job.plan, job.prior), job.prior) for job in all_jobs(groups))
    late = [(step, prior) for step, prior in starts if step is not None]
    if not late:
        return
    start_step, prior = min(late, key=lambda each: each[0])
    kind = str(prior.metadata.get("prior_kind"))
    obeyed = OBEYED_AFTER_6.get(kind, OBEYED_AFTER_6["prompted"])
    advice = "make the prior again" if prior.is_legacy else "leave --start_step out"
    log.warning(
        f"resuming after step {start_step} of {prior.num_inference_steps} is late for a new motion: "
        f"after 6 of 10, {obeyed} of the embedded model's clips obeyed a new prompt, 100% in a full run; "
        f"{advice} to have it obeyed in as many steps"
    )


def late_start(plan: Plan, prior: Prior) -> int | None:
    """The step after which a plan brings a new prompt in, if most of the motion is settled by then."""
    step = plan.start_step
    if step is None or plan.prompt == prior.metadata.get("prompt"):
        return None
    return step if is_late(step, prior.num_inference_steps) else None


def warn_of_doubts(group: Group, *, device: str) -> None:
    """Say what could not be checked, or what differs from when the prior was made and may change bits."""
    prior = group.prior
    if prior.is_legacy:
        log.warning(
            f"{prior.directory} is of an older format, so these could not be checked: model "
            f"({group.plans[0].model} assumed), weights, image, prompts, cfg_scale, seed, checksums, "
            "versions, device"
        )
        return
    names = ("torch", "diffsynth", "device_name", "attention")
    differ = [
        f"{name} {now} (then {then!r})"
        for name, now, then in differences_since(prior.metadata, device, names)
    ]
    if differ:
        log.warning(
            f"not as when the prior was made: {', '.join(differ)}; the result may differ in the last bits"
        )


def say_what_auto_means(groups: Sequence[Group]) -> None:
    """Tell the step that each prior chose."""
    for group in groups:
        chosen = [plan.auto for plan in group.plans if plan.auto is not None]
        if chosen:
            log.info(f"{f'{group.prior.directory}: ' if len(groups) > 1 else ''}auto: {chosen[0]}")


def say_what_runs(groups: Sequence[Group], *, there: int | None) -> None:
    """Tell what will run: a single video's steps, or a sweep's sums."""
    jobs = all_jobs(groups)
    if there is not None:
        log.info(f"{summarize_jobs(jobs)}; {there} are there already")
        return
    [job] = jobs
    total, running = job.prior.num_inference_steps, len(job.plan.steps_to_run)
    if job.plan.sigmas is not None:
        log.info(f"runs {running} steps from sigma {job.plan.sigmas[0]:.3f}; the prior's run took {total}")
        return
    log.info(
        f"runs {running} of {total} steps, skips {total - running}"
        if running
        else f"step {job.plan.start_step} is the last: nothing left to run, decodes only"
    )


def report_failures(failed: Mapping[Path, Exception], total: int) -> None:
    """Tell what a sweep could not make.

    Raises:
        RunError: there is such a video.
    """
    for path, error in failed.items():
        log.warning(f"{path.name} failed: {' '.join(str(error).split())[:200] or type(error).__name__}")
    if failed:
        raise RunError(
            f"{len(failed)} of {total} videos failed, see above; the others are in "
            f"{next(iter(failed)).parent}; the same command tries only these again"
        )


# --- the run ------------------------------------------------------------------------------------------------


def load_all(groups: Sequence[Group]) -> str:
    """Check every prior's schedule, load its tensors, and return the dtype they are in.

    Raises:
        InputError: a schedule differs, a file holds something else, or the dtypes differ.
    """
    from step_skip.schedule import check_installed_schedule

    dtypes: dict[str, Path] = {}
    for group in groups:
        check_installed_schedule(group.prior)
        dtypes.setdefault(load_all_inputs(group), group.prior.directory)
    if len(dtypes) > 1:
        raise InputError(f"{' and '.join(map(str, dtypes.values()))} differ in dtype; sweep them apart")
    return next(iter(dtypes))


def make_videos(
    groups: Sequence[Group], args: argparse.Namespace, *, there: int | None
) -> dict[Path, Exception]:
    """Check what is left to check, load the model and run; returns the errors of jobs that failed.

    Args:
        there: the videos of a sweep that are there already; None: no sweep, a single video.
    """
    jobs = all_jobs(groups)
    model, folder = jobs[0].plan.model, jobs[0].path.parent
    device = pick_device(model, args.device)
    for group in groups:
        warn_of_doubts(group, device=device)
        warn_of_what_differs(group)
    warn_of_old_motion(groups)
    dtype = load_all(groups)
    sizes = [video_bytes(settings_of(job.plan, job.prior)) for job in jobs]
    check_folder(folder, sum(sizes) + 2**20)
    say_what_runs(groups, there=there)
    options = load_options(jobs, device=device, dtype=dtype, vram=args.vram, model_dir=args.model_dir)
    guided = args.lora and any(job.plan.cfg_scale != 1 for job in jobs)
    if guided and (hint := distilled_hint(options.loras, sigmas=True)):
        log.info(hint)
    with contextlib.nullcontext() if there is None else sweep_folder(folder):
        return run_jobs(groups, options=options)


def dry_run(jobs: Sequence[Job], args: argparse.Namespace, *, there: int) -> None:
    """Say what the jobs that are left would take: time, memory, what would be loaded and downloaded."""
    components = components_to_load(jobs)
    loaded = ", ".join(components) or "nothing"
    log.info(f"{summarize_jobs(jobs)}; {there} are there already; would load {loaded}")
    if jobs:
        plan = jobs[0].plan
        device = "cuda" if plan.model in MODELS else "cpu"  # also where there is none
        device = device if args.device is None else pick_device(plan.model, args.device)
        dtype = plan.dtype or model_defaults(plan.model, args.model_dir).dtype
        options = load_options(jobs, device=device, dtype=dtype, vram=args.vram, model_dir=args.model_dir)
        check_download(options, components)
        say_what_each_mode_takes(options, loaded_first(components))


def main(argv: list[str] | None = None) -> Path | str:
    """Make one video and return its path, or a sweep of them and return its folder."""
    args = parse_args(argv)
    if args.verify:
        return prior_utils.verify(args.prior_dir)
    is_sweep = args.prompts_file is not None or args.output_dir is not None
    groups = make_groups(
        args.prior_dir,
        cli.read_choices(args),
        output=args.output,
        output_dir=args.output_dir,
        overwrite=args.overwrite,
        is_sweep=is_sweep,
        nearest=args.nearest,
    )
    jobs = all_jobs(groups)
    is_sweep = is_sweep or len(jobs) > 1
    say_what_auto_means(groups)
    read_all_inputs(groups)
    made = {job.path for group in groups for job in group.jobs if is_sweep and is_made(job, group)}
    left = [replace(group, jobs=[job for job in group.jobs if job.path not in made]) for group in groups]
    to_do = [group for group in left if group.jobs]
    if args.dry_run:
        dry_run(all_jobs(to_do), args, there=len(made))
        return "\n".join(describe_job(job, made=job.path in made) for job in jobs)
    failed = make_videos(to_do, args, there=len(made) if is_sweep else None) if to_do else {}
    if not is_sweep:
        if failed:
            raise next(iter(failed.values()))
        return jobs[0].path
    folder = jobs[0].path.parent
    if len(failed) < len(jobs):
        with sweep_folder(folder):
            write_page(folder)
    report_failures(failed, len(jobs))
    return folder


def command() -> None:
    """The console script of an installed package."""
    cli.run_script(main)


if __name__ == "__main__":
    command()
