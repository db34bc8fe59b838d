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
import contextlib
import dataclasses
import functools
import logging
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_skip.cli import flags, prior_flags
from step_skip.cli.terminal import run_script
from step_skip.cluster.driver import connected
from step_skip.cluster.priors import make_on_cluster
from step_skip.errors import InputError, RunError
from step_skip.files.writing import check_folder, locked
from step_skip.generate.choices import PriorChoices, check_images, check_prior_choices
from step_skip.generate.plan import plan_prior
from step_skip.generate.resume import check_finishable, go_on, read_own_images, read_resumable
from step_skip.generate.run import Left, what_is_left
from step_skip.media.videos import fetch_example, read_video
from step_skip.method.steps import recommended_num_steps
from step_skip.models.compute import check_compute
from step_skip.models.families import FAMILIES, MODELS
from step_skip.models.loading import load_told, loaded_first
from step_skip.models.lora import find_recorded_loras
from step_skip.models.machine import pick_device
from step_skip.models.memory import check_download, describe_peak, say_what_each_mode_takes
from step_skip.models.weights import ROOT, LoadOptions, family_name, model_defaults
from step_skip.pipeline.results import Clock
from step_skip.pipeline.settings import RunSettings
from step_skip.prior.checks import check_fingerprint
from step_skip.prior.preview import check_previewable, preview_to
from step_skip.prior.prior import IMAGE_FILE, PREVIEW_FILE, Prior, bytes_of_steps, denoised_file
from step_skip.prior.schema import METADATA_FILE
from step_skip.prior.writer import check_run_id
from step_skip.sweep.make_priors import (
    check_first,
    make_all,
    read_images,
    report_failed_priors,
    usable,
    what_to_load,
)
from step_skip.sweep.priors import (
    PriorJob,
    bytes_needed,
    bytes_of,
    describe_prior_job,
    forwards_of,
    make_jobs,
    plan_jobs,
)
from step_skip.sweep.progress import describe_seconds

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


def read_prior_choices(args: argparse.Namespace) -> PriorChoices:
    """What the flags ask of the run, refused before anything heavy is imported if no run could use it.

    Raises:
        InputError: with the flag that is wrong.
    """
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(PriorChoices)}
    choices = PriorChoices(**given | {"seed": args.seed[0]})
    check_prior_choices(choices)
    family = FAMILIES[family_name(args.model, args.model_dir)]
    has_image = args.image is not None or args.download_example
    check_images(args.model, family, image=has_image, end_image=args.end_image is not None)
    if args.preview and not has_image:
        raise InputError("--preview takes its colours from an image, and there is none: leave it out")
    if args.denoising_strength < 1 and args.input_video is None:
        raise InputError(
            f"--denoising_strength {args.denoising_strength} starts from a video: give --input_video"
        )
    if args.input_video is not None and args.denoising_strength == 1:
        raise InputError(
            "--input_video is not used at --denoising_strength 1: give a strength below 1, 0.7 say"
        )
    for run_id in args.run_id or ():
        check_run_id(args.output_dir, run_id, but_priors=True)
    return choices


def read_jobs(args: argparse.Namespace, choices: PriorChoices) -> list[PriorJob]:
    """The priors to make. Neither torch nor a model is needed.

    Raises:
        InputError: see `make_jobs`; or the only image can't be used.
    """
    images, ends = args.image or [], args.end_image or []
    jobs = make_jobs(
        images, args.prompt, choices, end_images=ends, seeds=args.seed, run_ids=args.run_id or []
    )
    if len({job.images.get(IMAGE_FILE) for job in jobs}) == 1:
        read_images(jobs[0], flags.options_of_flags(args), family_name(args.model, args.model_dir))
    return jobs


def read_input_video(args: argparse.Namespace, settings: RunSettings) -> list[Image] | None:
    """The frames of the input video, for --denoising_strength below 1."""
    if args.input_video is None:
        return None
    sizes = {"width": settings.width, "height": settings.height, "num_frames": settings.num_frames}
    return read_video(args.input_video, **sizes)


# --- making and finishing priors ----------------------------------------------------------------------------


def make_priors(args: argparse.Namespace) -> list[PriorJob]:
    """Make a prior of every image, on one loaded pipeline or on a cluster; a dry run only plans them."""
    choices, family = read_prior_choices(args), family_name(args.model, args.model_dir)
    jobs = [] if args.download_example else read_jobs(args, choices)
    device = pick_device(args.model, args.device) if args.ray is None else "cpu"  # workers have their own
    options = dataclasses.replace(flags.options_of_flags(args), device=device)
    check_compute(vram=options.vram, quantize=options.quantize, compile=options.compile)
    if args.download_example:
        plan_prior(options, choices, family=family)
        args.image = [fetch_example(EXAMPLE_IMAGE, root=ROOT)]
        jobs = read_jobs(args, choices)
    jobs = plan_jobs(jobs, options, family, args.output_dir)
    to_do = usable(jobs, [job for job in jobs if not job.made])
    say_what_it_costs(jobs, to_do)
    if to_do:
        check_folder(args.output_dir, sum(bytes_of(job) for job in to_do))
        options, components = what_to_load(to_do, options)
    if to_do and args.dry_run:
        device = "cuda" if args.ray is not None and args.model in MODELS else device
        options = dataclasses.replace(options, device=device)
        check_download(options, components)
        say_what_each_mode_takes(options, loaded_first(components))
    elif to_do:
        make_missing(args, jobs, to_do, options, components)
    return jobs


def make_missing(
    args: argparse.Namespace,
    jobs: Sequence[PriorJob],
    to_do: Sequence[PriorJob],
    options: LoadOptions,
    components: Sequence[str],
) -> None:
    """Make the priors that aren't there; see `make_all`.

    Args:
        jobs: all that were asked for.
    """
    family = family_name(args.model, args.model_dir)
    read_video = functools.lru_cache(maxsize=1)(functools.partial(read_input_video, args))
    read_video(to_do[0].prior.settings)
    check_first(to_do, options, family, on_cluster=args.ray is not None)
    if not (to_do := usable(jobs, to_do)):
        return
    begun: list[Path] = []
    how: dict[str, Any] = {
        "output_dir": args.output_dir,
        "read_video": read_video,
        "on_made": functools.partial(say_what_was_made, args, briefly=len(jobs) > 1),
    }
    if args.ray is not None:
        with connected(args.ray, workers=args.workers) as cluster:
            options = dataclasses.replace(options, device=cluster.device(args.model, args.device))
            make_on_cluster(to_do, cluster, options=options, family=family, components=components, **how)
        return
    with saying_how_to_go_on(args, begun, several=len(jobs) > 1):
        model = load_told(options, components, by_expert=True)
        callback = preview_in(begun) if args.preview else None
        make_all(to_do, model, on_begin=begun.append, callback=callback, single=len(jobs) == 1, **how)


def resume(args: argparse.Namespace) -> Path:
    """Finish a prior that was interrupted, stopped or damaged, and return its folder.

    Raises:
        InputError: it can't be finished as the run that was begun would have.
    """
    read_resumable(args.resume)  # says what is wrong with the folder before it is locked
    with locked(args.resume):
        prior = read_resumable(args.resume)
        left = what_is_left(prior)
        if prior.is_complete and not left.damaged and not left.components:
            log.info(f"{prior.directory} is complete and undamaged: nothing to do")
            return prior.directory
        made = finish(args, prior, left)
    say_what_was_made(args, made, len(left.steps))
    return prior.directory


def finish(args: argparse.Namespace, prior: Prior, left: Left) -> Prior:
    """Run what is left of a prior whose folder is locked."""
    m = prior.metadata
    device = pick_device(m["model"], args.device or m["device"])
    check_finishable(prior, device)
    check_folder(prior.directory, bytes_needed(prior, videos=len(left.videos)))
    if args.preview:
        check_previewable(prior)
    start = read_own_images(prior) if left.start_step is None else None
    loras = find_recorded_loras(m.get("lora", [])) if left.components else ()
    settings, computes = prior.settings, (m.get("quantize"), m.get("compile"))
    options = LoadOptions(m["model"], device, m["dtype"], args.vram, args.model_dir, loras, *computes)
    options = dataclasses.replace(options, size=settings.size, tiled=settings.tiled)
    log.info(f"{len(left.steps)} of {prior.num_inference_steps} steps are left to run")
    clock, model = Clock(), None
    if left.components:
        check = functools.partial(check_fingerprint, prior)
        model = load_told(options, left.components, check=check, by_expert=True)
    clock.add("load")
    with saying_how_to_go_on(args, [prior.directory]):
        callback = preview_in([prior.directory]) if args.preview else None
        return go_on(prior, left, model=model, start=start, clock=clock, callback=callback)


def preview_in(begun: list[Path]) -> ProgressCallback:
    """What writes the preview of a prior; by the time a step has run its folder is the last of these."""
    return lambda *step: preview_to(begun[-1], begun[-1] / PREVIEW_FILE)(*step)


# --- what the user is told ----------------------------------------------------------------------------------


@contextlib.contextmanager
def saying_how_to_go_on(
    args: argparse.Namespace, begun: list[Path], *, several: bool = False
) -> Iterator[None]:
    """Where a run that had begun is cut short, say in one line how to go on with what is whole.

    Args:
        begun: the prior's folder, once there is something in it; of several the last.
    """
    try:
        yield
    except RunError:  # going on would only fail again
        raise
    except BaseException:
        if begun and (begun[-1] / METADATA_FILE).exists():
            again = command_line(args, "generate_prior.py", "--resume", begun[-1])
            log.info(f"every whole step is kept; go on with: {'the same command' if several else again}")
        raise


def say_what_it_costs(jobs: Sequence[PriorJob], to_do: Sequence[PriorJob]) -> None:
    """Tell what priors cost once, and what each new prompt will; and how many are there already."""
    there = sum(job.made for job in jobs)
    if jobs[0].made and len(jobs) == 1:
        log.info("made before, by the same choices, and no file is missing: nothing to do")
    elif len(jobs) > 1 or not to_do:
        size = sum(map(bytes_of, to_do)) / 1e9
        log.info(f"{len(to_do)} priors to make, at most {size:.1f} GB; {there} are there already")
    if not to_do:
        return
    prior = to_do[0].prior
    steps, forwards = prior.num_inference_steps, forwards_of(prior, whole=True)
    chosen = recommended_num_steps(steps)
    each = chosen if forwards == steps else 2 * chosen - 1
    log.info(
        f"{len(to_do)} x {steps} steps, {forwards} forwards and about {bytes_of_steps(prior) / 1e6:.0f} MB "
        f"each; a new prompt then takes {each} forwards, and prior_utils.py prune makes a prior smaller"
    )


def say_what_was_made(
    args: argparse.Namespace, prior: Prior, steps_run: int, *, briefly: bool = False
) -> None:
    """Sum up a prior and say what can be done with it."""
    m, directory = prior.metadata, prior.directory
    steps = m["num_inference_steps"]
    resumed = f'{command_line(args, "infer_from_prior.py", "--prior_dir", directory)} --prompt "..."'
    cost = f"{steps_run} steps, {m['forwards']} forwards, {describe_seconds(m['seconds'])}"
    log.info(f"{directory}: {cost}; {describe_peak(m['peak_memory'])}")
    if briefly:
        return
    if m["status"] == "stopped":
        preview = directory / denoised_file(prior.whole_steps - 1)
        log.info(f"Stopped after step {prior.whole_steps - 1} of {steps}; what it points at: {preview}")
        log.info("Finished with a new prompt:")
        log.info(f"  {resumed}")
        log.info("Or with its own, as if never stopped:")
        log.info(f"  {command_line(args, 'generate_prior.py', '--resume', directory)}")
        return
    start_step, num_steps = m["start_step"], recommended_num_steps(steps)
    differential = f" --num_steps {num_steps}" if m.get("start_step_chosen") else ""
    log.info(f"A new prompt in {num_steps} of {steps} steps:")
    log.info(f"  {resumed}{differential}")
    log.info(f"Or resumed after step {start_step}, {steps - start_step - 1} of {steps} steps:")
    log.info(f"  {resumed} --start_step {start_step}")


def command_line(args: argparse.Namespace, name: str, *words: object) -> str:
    """A command line of one of the scripts, from where the user is, with the same model and device."""
    script = Path(__file__).resolve().with_name(name)
    if script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    parts: list[object] = ["python", script, *words]
    for flag, default in (("model_dir", None), ("device", None), ("vram", "auto")):
        if getattr(args, flag) != default:
            parts += [f"--{flag}", getattr(args, flag)]
    return shlex.join(map(str, parts))


def describe_priors(args: argparse.Namespace, jobs: Sequence[PriorJob]) -> Iterator[str]:
    """The folder of each prior that is there, in a dry run each as a line of JSON; then what failed.

    Raises:
        RunError: some could not be made.
    """
    for job in jobs:
        if args.dry_run or job.error is None:
            yield describe_prior_job(job) if args.dry_run else str(job.directory)
    report_failed_priors(jobs, folder=None if args.dry_run else args.output_dir)


def main(argv: list[str] | None = None) -> str | Iterable[str]:
    """Make or finish priors and return their folders, one a line; in a dry run a line of JSON for each."""
    args = parse_args(argv)
    if args.resume is not None:
        return str(resume(args))
    jobs = make_priors(args)
    lines = describe_priors(args, jobs)
    return "".join(lines) if len(jobs) == 1 else lines


def command() -> None:
    """The console script of an installed package."""
    run_script(main)


if __name__ == "__main__":
    command()
