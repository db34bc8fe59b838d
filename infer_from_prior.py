"""Make new clips of a prior's identity, in a fraction of the steps of a full run.

    python infer_from_prior.py --prior_dir prior_output/run_<id> --prompt "she speaks"
    python infer_from_prior.py --prior_dir prior_output/run_<id> --prompt "she speaks" --start_step 6
    python infer_from_prior.py --prior_dir prior_output/run_* --prompts_file prompts.txt --start_step 2-8

The first command runs 3 of 10 steps, spread over the schedule. Between them the clip follows the prior's
path, changed by the new prompt: this is a differential resume.

The second command loads the latents after step 6 and runs steps 7, 8 and 9. Most of the motion is fixed by
then, and a prompt for another motion may have little effect.

The third command is a sweep: it makes a clip of every combination of prior, prompt and start step, and loads
the model once. The same command run again after an interruption makes only the clips that are missing.

Without --prompt the prior's own prompt is used, and the clip equals the prior's own clip, bit for bit.

The last line on stdout is the clip's path or, for a sweep, its folder. A .json file beside each clip records
how it was made.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # during the imports, Ctrl-C ends the process without a traceback

import argparse
import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from step_skip.cli import clip_flags, flags, prompts
from step_skip.cli.like import take_over
from step_skip.cli.manage import verify
from step_skip.cli.terminal import run_script
from step_skip.cluster.clips import ClipCluster
from step_skip.cluster.driver import connected
from step_skip.errors import InputError
from step_skip.infer.choices import AUTO
from step_skip.page.page import running_page
from step_skip.sweep.cost import describe_clip_job
from step_skip.sweep.make_clips import (
    Machine,
    Sweep,
    ThisProcess,
    log_what_it_takes,
    make_sweep,
    plan_sweep,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; values that are not given are taken from the prior later."""
    parser = flags.Parser(__doc__)
    parser.add_argument(
        "--prior_dir",
        type=flags.utf8_path,
        nargs="+",
        action="extend",
        metavar="DIR",
        help="Folder run_<id> that generate_prior.py made. Several are a sweep over identities or, with "
        "--nearest, priors of one identity to choose from.",
    )
    parser.add_argument(
        "--nearest",
        action="store_true",
        help="Let each clip follow the prior that is nearest to its prompt, among the priors with the same "
        "image, size, seed and settings. They are compared by the velocity of the first step, which costs "
        "nothing extra. Make such priors with generate_prior.py --image FILE --prompt TEXT TEXT ...",
    )
    parser.add_argument(
        "--like",
        type=flags.utf8_path,
        metavar="FILE",
        help="Make a clip again, as its .json or .mp4 FILE records; flags given beside it replace recorded "
        "choices.",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="Make no clip. Check every file of the priors, and report what is damaged and what is still "
        "usable.",
    )
    clip_flags.add_method_arguments(parser)
    clip_flags.add_prompt_arguments(parser)
    flags.add_cheaper_arguments(
        parser,
        lora_type=flags.lora_strengths,
        lora_help="They may differ from the prior's: a distilled LoRA, for example. --lora without a value "
        "applies none. Strengths separated by commas, PATH:0.5,1, are a sweep. (default: the prior's)",
    )
    clip_flags.add_clip_output_arguments(parser)
    clip_flags.add_checked_arguments(parser)
    flags.add_model_arguments(
        parser,
        model=None,
        model_help="The model of the prior; any other is refused. (default: the prior's)",
        dtype_help="The data type of the prior; any other is refused. (default: the prior's)",
    )
    flags.add_machine_arguments(parser, inherits=True)
    flags.add_cluster_arguments(parser, what="clips", reads="priors")
    args = parser.parse_args(argv)
    given = flags.given_flags(argv)
    if args.prior_dir is None and args.like is None:
        parser.error("the following arguments are required: --prior_dir, or --like")
    others = sorted(given - {"--prior_dir", "--verify"})
    if args.verify and others:
        parser.error(f"--verify only checks priors: leave out {others[0]}")
    flags.check_quotes(parser, argv, args.prompt)
    flags.check_cluster_arguments(parser, args)
    if args.ray is not None and args.save_prior:
        parser.error(
            "--save_prior needs the latents of each step, which workers of --ray don't return: leave it out"
        )
    if args.overwrite and args.output is None:
        parser.error("--overwrite applies to the file named by --output: give --output, too")
    if args.like is not None:
        take_over(args, given)
    may_be_auto = args.prompts_file is not None or any(AUTO in each for each in args.start_step or ())
    if args.text_share is not None and not may_be_auto:
        parser.error("--text_share applies to --start_step auto: give that, too")
    return args


# --- the run ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def machine_of(args: argparse.Namespace, sweep: Sweep) -> Iterator[Machine]:
    """Yield the machine that makes the missing clips: the cluster of --ray or, without it, this process."""
    if args.ray is None or not sweep.missing:
        yield ThisProcess(args.device)
        return
    with connected(args.ray, workers=args.workers) as cluster:
        yield ClipCluster(cluster, args.device)


def main(argv: list[str] | None = None) -> Path | str | Iterable[str]:
    """Make one clip and return its path, or make a sweep and return its folder."""
    args = parse_args(argv)
    if args.verify:
        return verify(args.prior_dir)
    sweep = plan_sweep(
        args.prior_dir,
        prompts.read_choices(args),
        output=args.output,
        output_dir=args.output_dir,
        overwrite=args.overwrite,
        is_sweep=args.prompts_file is not None or args.output_dir is not None,
        nearest=args.nearest,
        preview=args.preview,
        save_prior=args.save_prior,
    )
    weights = {"vram": args.vram, "model_dir": args.model_dir}
    if args.dry_run:
        log_what_it_takes(sweep, device=args.device, **weights)
        return map(describe_clip_job, sweep.jobs)
    with machine_of(args, sweep) as machine:
        make_sweep(sweep, machine, recorded_loras=args.lora is None, page=running_page, **weights)
    if not sweep.is_single:
        return sweep.folder
    [job] = sweep.jobs
    if args.output not in (None, job.path):
        raise InputError(
            f"--output: another run wrote {args.output} in the meantime; the clip of this run is {job.path}"
        )
    return job.path


def command() -> None:
    """Run the console script of an installed package."""
    run_script(main)


if __name__ == "__main__":
    command()
