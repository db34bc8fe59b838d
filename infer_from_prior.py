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
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import prior_utils
from step_skip import cli, cli_machine
from step_skip.closeness import CLOSENESS, DEFAULT_CLOSENESS
from step_skip.families import MODELS
from step_skip.files import InputError, check_folder
from step_skip.infer import warn_of_what_differs, warn_of_words
from step_skip.jobs import load_options, run_jobs
from step_skip.like import take_over
from step_skip.loading import loaded_first, pick_device
from step_skip.lora import Lora, describe_loras, distilled_hint, find_recorded_loras, parse_recorded_loras
from step_skip.media import video_bytes
from step_skip.memory import check_download, say_what_each_mode_takes
from step_skip.models import model_defaults
from step_skip.page import running_page, write_page
from step_skip.plan import FIXED, settings_of
from step_skip.plan_steps import AUTO
from step_skip.preview import check_previewable
from step_skip.steps import DEFAULT_TEXT_SHARE, FORMATION_FILE
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
    settle_single,
    summarize_jobs,
    sweep_folder,
)
from step_skip.tell import (
    report_failures,
    say_what_auto_means,
    say_what_runs,
    warn_of_doubts,
    warn_of_old_motion,
)

log = logging.getLogger("step_skip")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; what is left out is taken from the prior later."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--prior_dir",
        type=cli.utf8_path,
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
        type=cli.utf8_path,
        metavar="FILE",
        help="a clip's .json or .mp4: make it again, or with the flags you give another one",
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
    given = cli.given_flags(argv)
    if args.prior_dir is None and args.like is None:
        parser.error("the following arguments are required: --prior_dir, or --like")
    others = sorted(given - {"--prior_dir", "--verify"})
    if args.verify and others:
        parser.error(f"--verify only looks at priors: leave out {others[0]}")
    cli.check_quotes(parser, argv, args.prompt)
    if args.overwrite and args.output is None:
        parser.error("--overwrite replaces what --output names: give --output")
    if args.like is not None:
        take_over(args, given)
    may_be_auto = args.prompts_file is not None or any(AUTO in each for each in args.start_step or ())
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
        type=cli.numbers_of_steps,
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
        help="more prompts, one per line; # begins a comment; a line that begins with { is JSON and may set "
        'what holds for it alone: {"prompt": "she speaks", "cfg_scale": 3, "start_step": "2-4"}; it knows '
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
        type=cli.alternatives,
        nargs="+",
        metavar="X",
        help="how strongly the prompt is followed; 1 switches guidance off and halves the cost; one, or one "
        "for each step that runs: 5 5 1 drops the second forward of the third; between commas, 2,3: a sweep "
        "(default: the prior's)",
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
        "--fps",
        type=cli.limited("fps", float),
        metavar="X",
        help="frames per second it is played at; their number is fixed by the prior (default: the prior's)",
    )
    group.add_argument(
        "--preview",
        action="store_true",
        help="show what each step points at as soon as it has run, in a small moving .webp beside the video",
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
    for name in FIXED:
        flag = f"--{name}"
        group.add_argument(
            flag, type=cli.limited(name, int), metavar="N", help=f"another needs another prior: its {flag}"
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


def find_loras(jobs: Sequence[Job]) -> tuple[Lora, ...]:
    """The LoRAs that a prior records; its videos' JSON describes them as they are applied now.

    Raises:
        InputError: see `find_recorded_loras`.
    """
    loras = find_recorded_loras(jobs[0].plan.lora)
    described = describe_loras(loras)
    for job in jobs:
        job.plan = replace(job.plan, lora=described)
    return loras


def make_videos(
    groups: Sequence[Group], args: argparse.Namespace, *, there: int | None, order: Sequence[str] = ()
) -> dict[Path, Exception]:
    """Check what is left to check, load the model and run; returns the errors of jobs that failed.

    Args:
        there: the videos of a sweep that are there already; None: no sweep, a single video.
        order: the names of all videos of a sweep, as they were asked for.
    """
    jobs = all_jobs(groups)
    model, folder = jobs[0].plan.model, jobs[0].path.parent
    device = pick_device(model, args.device)
    loras = find_loras(jobs) if args.lora is None else tuple(args.lora)
    for group in groups:
        warn_of_doubts(group, device=device)
        warn_of_what_differs(group)
    warn_of_old_motion(groups)
    dtype = load_all(groups)
    sizes = [video_bytes(settings_of(job.plan, job.prior)) for job in jobs]
    check_folder(folder, sum(sizes) + 2**20)
    say_what_runs(groups, there=there)
    guided = args.lora and any(job.plan.cfg_scale != 1 for job in jobs)
    if guided and (hint := distilled_hint(loras, sigmas=True)):
        log.info(hint)
    options = load_options(
        jobs, device=device, dtype=dtype, vram=args.vram, model_dir=args.model_dir, loras=loras
    )
    warn_of_words(groups, options)
    if there is None:
        return run_jobs(groups, options=options)
    with sweep_folder(folder), running_page(folder, order) as on_made:
        return run_jobs(groups, options=options, on_made=on_made)


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
        loras = parse_recorded_loras(plan.lora)
        options = load_options(
            jobs, device=device, dtype=dtype, vram=args.vram, model_dir=args.model_dir, loras=loras
        )
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
    for job in jobs if args.preview else ():
        check_previewable(job.prior)
        job.preview = True
    is_sweep = is_sweep or len(jobs) > 1
    say_what_auto_means(groups)
    read_all_inputs(groups)
    if not is_sweep:
        settle_single(groups[0], output=args.output, overwrite=args.overwrite)
    made = {job.path for group in groups for job in group.jobs if not args.overwrite and is_made(job, group)}
    left = [replace(group, jobs=[job for job in group.jobs if job.path not in made]) for group in groups]
    to_do = [group for group in left if group.jobs]
    if args.dry_run:
        dry_run(all_jobs(to_do), args, there=len(made))
        return "\n".join(describe_job(job, made=job.path in made) for job in jobs)
    if not is_sweep and made:
        log.info("made before, by the same choices, and whole: nothing to do")
    order = [job.path.name for job in jobs]
    there = len(made) if is_sweep else None
    failed = make_videos(to_do, args, there=there, order=order) if to_do else {}
    if not is_sweep:
        if failed:
            raise next(iter(failed.values()))
        if args.output not in (None, jobs[0].path):
            raise InputError(
                f"--output: another run made {args.output} meanwhile; this run's clip is {jobs[0].path}"
            )
        return jobs[0].path
    folder = jobs[0].path.parent
    if not to_do:
        with sweep_folder(folder):
            write_page(folder, order)
    report_failures(failed, len(jobs))
    return folder


def command() -> None:
    """The console script of an installed package."""
    cli.run_script(main)


if __name__ == "__main__":
    command()
