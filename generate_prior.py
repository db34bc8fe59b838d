"""Make a prior: one full run for an identity, with the latents of every step kept.

    python generate_prior.py --model tiny --image data/tiny_wan_i2v/inputs/mila.png
    python generate_prior.py --download_example
    python generate_prior.py --image ann.jpg ben.jpg --stop_after 3
    python generate_prior.py --resume prior_output/run_<id>

infer_from_prior.py then makes new videos of the same identity from it, in a fraction of the steps.
Several images share one loading of the model; stopped after a step, a prior is a draft with a preview.
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
import itertools
import json
import logging
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import step_skip
from step_skip import cli, cli_machine, cli_prior
from step_skip.compute import check_compute
from step_skip.families import FAMILIES
from step_skip.files import InputError, RunError, check_folder, locked
from step_skip.generate import (
    Left,
    check_same_machine,
    read_own_images,
    read_resumable,
    run_what_is_left,
    what_is_left,
)
from step_skip.images import Picture, read_pictures
from step_skip.loading import loaded_first, pick_device
from step_skip.lora import distilled_hint, find_recorded_loras
from step_skip.media import fetch_example, read_video, video_bytes
from step_skip.memory import check_download, describe_peak, say_what_each_mode_takes
from step_skip.metadata import PriorWriter
from step_skip.models import (
    ROOT,
    LoadOptions,
    cache_components,
    family_name,
    model_defaults,
)
from step_skip.preview import check_previewable, preview_to
from step_skip.prior import (
    END_IMAGE_FILE,
    IMAGE_FILE,
    METADATA_FILE,
    PREVIEW_FILE,
    Prior,
    RunSettings,
    bytes_of_prior,
    bytes_of_steps,
    check_files,
    check_fingerprint,
    denoised_file,
)
from step_skip.prior_plan import PriorChoices, check_images, check_prior_choices, plan_prior
from step_skip.results import Clock
from step_skip.run_dir import check_run_id
from step_skip.steps import recommended_num_steps
from step_skip.tell import describe_seconds, load_told

if TYPE_CHECKING:
    from PIL.Image import Image

    from step_skip.schedule import ProgressCallback

log = logging.getLogger("step_skip")

EXAMPLE_IMAGE = ROOT / "data" / "examples" / "wan" / "input_image.jpg"
RESUME_FLAGS = {"--resume", "--model_dir", "--device", "--vram", "--preview"}


@dataclass(frozen=True)
class Wanted:
    """One prior to make."""

    name: str  # its image's, without one its prompt
    images: dict[str, Picture]  # by file
    prompt: str
    run_id: str | None
    choices: PriorChoices  # with the size of its image


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and fill in the model's own defaults."""
    parser = cli.Parser(__doc__)
    cli_prior.add_identity_arguments(parser)
    cli_prior.add_run_arguments(parser)
    cli_prior.add_output_arguments(parser)
    cli.add_cheaper_arguments(parser, lora_help="resumed runs take the same unless told otherwise")
    cli.add_model_arguments(
        parser,
        model="I2V-480P",
        model_help="tiny runs on a CPU, the others need CUDA",
        dtype_help="(default: bfloat16; tiny: float32)",
    )
    cli_machine.add_machine_arguments(parser, inherits=False)
    args = parser.parse_args(argv)
    cli.check_quotes(parser, argv, args.prompt)
    args.dtype = args.dtype or model_defaults(args.model, args.model_dir).dtype
    if args.resume is not None:
        settings = sorted(cli.given_flags(argv) - RESUME_FLAGS)
        if settings:
            parser.error(f"--resume takes every setting from its run: leave out {settings[0]}")
    return args


def read_prior_choices(args: argparse.Namespace) -> PriorChoices:
    """What the flags ask of the run, refused before anything heavy is imported if no run could use it.

    Raises:
        InputError: with the flag that is wrong.
    """
    choices = PriorChoices(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(PriorChoices)}
    )
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
        check_run_id(args.output_dir, run_id)
    return choices


def read_wanted(args: argparse.Namespace, choices: PriorChoices) -> list[Wanted]:
    """The priors to make: one for each image, each with its prompt. Neither torch nor a model is needed.

    Raises:
        InputError: an image that can't be used, a --run_id given twice, or as many prompts or ids as fit
            no reading.
    """
    paths, what = args.image or [None], "image"
    if len(paths) == 1:  # a prior of each prompt
        paths, what = paths * len(args.prompt), "prompt"
    number = len(paths)
    prompts = args.prompt * number if len(args.prompt) == 1 else args.prompt
    end_paths = args.end_image or [None]
    end_paths = end_paths * number if len(end_paths) == 1 else end_paths
    run_ids = args.run_id or [None] * number
    for flag, values in (("--prompt", prompts), ("--end_image", end_paths), ("--run_id", run_ids)):
        if len(values) != number:
            raise InputError(f"{flag}: {len(values)} for {number} {what}s; give one for each {what}")
    for run_id in run_ids:
        if run_id is not None and run_ids.count(run_id) > 1:
            raise InputError(f"--run_id {run_id}: given twice; every prior needs its own")
    defaults = model_defaults(args.model, args.model_dir)
    family = FAMILIES[family_name(args.model, args.model_dir)]

    def read(name: str, path: Path | None, end_path: Path | None, prompt: str, run_id: str | None) -> Wanted:
        given = {IMAGE_FILE: path, END_IMAGE_FILE: end_path}
        sized, pictures = read_pictures(given, choices, defaults=defaults, family=family)
        return Wanted(name, pictures, prompt, run_id, sized)

    names = map(str, args.prompt if what == "prompt" and number > 1 else args.image or args.prompt)
    return list(itertools.starmap(read, zip(names, paths, end_paths, prompts, run_ids, strict=True)))


def read_input_video(args: argparse.Namespace, settings: RunSettings) -> list[Image] | None:
    """The frames of the input video, for --denoising_strength below 1."""
    if args.input_video is None:
        return None
    sizes = {"width": settings.width, "height": settings.height, "num_frames": settings.num_frames}
    return read_video(args.input_video, **sizes)


# --- making and finishing priors ----------------------------------------------------------------------------


def make_priors(args: argparse.Namespace) -> list[Path] | list[str]:
    """Make a prior of every image on one loaded pipeline, and return their folders; in a dry run, as JSON."""
    choices, family = read_prior_choices(args), family_name(args.model, args.model_dir)
    wanted = [] if args.download_example else read_wanted(args, choices)
    options = dataclasses.replace(cli.load_options(args), device=pick_device(args.model, args.device))
    check_compute(vram=options.vram, quantize=options.quantize, compile=options.compile)
    if args.download_example:
        plan_prior(options, choices, family=family)
        args.image = [fetch_example(EXAMPLE_IMAGE, root=ROOT)]
        wanted = read_wanted(args, choices)
    wanted, planned = plan_all(wanted, options, family)
    videos = 1 + (choices.num_inference_steps if args.save_decoded_videos else 0)
    check_folder(args.output_dir, sum(bytes_needed(each, videos=videos) for each in planned))
    read = functools.cache(functools.partial(read_input_video, args))
    input_videos = [read(each.settings) for each in planned]
    settings = planned[0].settings
    if settings.cfg_scale != 1 and (hint := distilled_hint(options.loras, sigmas=False)):
        log.info(hint)
    say_what_it_costs(planned[0], len(planned))
    components = [*planned[0].family.components, *cache_components(settings.skip_cache)]
    largest = max((each.settings.size for each in planned), key=math.prod)
    options = dataclasses.replace(options, size=largest, tiled=settings.tiled)
    if args.dry_run:
        check_download(options, components)
        say_what_each_mode_takes(options, loaded_first(components))
        pairs = zip(wanted, planned, strict=True)
        return [describe_wanted(each, prior, videos=videos) for each, prior in pairs]
    model = load_told(options, components, by_expert=True)
    made, failed = [], []
    for each, input_video in zip(wanted, input_videos, strict=True):
        begun: list[Path] = []
        try:
            with saying_how_to_go_on(args, begun):
                prior = step_skip.generate_prior(
                    model,
                    each.images.get(IMAGE_FILE),
                    each.prompt,
                    end_image=each.images.get(END_IMAGE_FILE),
                    output_dir=args.output_dir,
                    run_id=each.run_id,
                    input_video=input_video,
                    on_begin=begun.append,
                    callback_on_step_end=preview_in(begun) if args.preview else None,
                    **dataclasses.asdict(each.choices),
                )
        except RunError as error:  # NaN, for example: the next image may do better
            if len(wanted) == 1:
                raise
            failed.append(f"{each.name}: {error}")
        else:
            say_what_was_made(args, prior, len(prior.metadata["seconds_per_step"]))
            made.append(prior.directory)
    if failed:
        raise RunError(f"{len(failed)} of {len(wanted)} priors failed: {'; '.join(failed)}")
    return made


def plan_all(wanted: list[Wanted], options: LoadOptions, family: str) -> tuple[list[Wanted], list[Prior]]:
    """Every prior with its sizes rounded as the model needs, and what will be known of it, each size once.

    Raises:
        InputError: see `plan_prior`.
    """
    rounded, planned, sizes = [], [], ("height", "width", "num_frames")
    plan = functools.cache(lambda choices: plan_prior(options, choices, family=family))
    for each in wanted:
        prior = Prior(Path(each.name), plan(each.choices))
        known = {name: prior.metadata[name] for name in sizes}
        rounded.append(dataclasses.replace(each, choices=dataclasses.replace(each.choices, **known)))
        planned.append(prior)
    return rounded, planned


def describe_wanted(wanted: Wanted, planned: Prior, *, videos: int) -> str:
    """A prior to make as one line of JSON: its settings and what they cost."""
    last_step = planned.metadata["stop_after"]
    guidance = planned.guidance[: None if last_step is None else last_step + 1]
    data = {
        "name": wanted.name,
        "prompt": wanted.prompt,
        **dataclasses.asdict(planned.settings),
        "model": planned.metadata["model"],
        "forwards": sum(1 if scale == 1 else 2 for scale in guidance),
        "bytes_at_most": bytes_needed(planned, videos=videos),
    }
    return json.dumps(data, ensure_ascii=False)


def bytes_needed(prior: Prior, *, videos: int) -> int:
    """A safe upper bound of what a prior takes on disk."""
    return bytes_of_prior(prior) + videos * video_bytes(prior.settings)


def resume(args: argparse.Namespace) -> Path:
    """Finish a prior that was interrupted, stopped or damaged, and return its folder.

    Raises:
        InputError: it can't be finished as the run that was begun would have.
    """
    read_resumable(args.resume)  # says what is wrong with the folder before it is locked
    with locked(args.resume):
        prior = read_resumable(args.resume)
        left = what_is_left(prior)
        if prior.is_complete:
            check_files(prior, prior.image_files)  # what can't be made again
        if prior.is_complete and not left.damaged and not left.components:
            log.info(f"{prior.directory} is complete and undamaged: nothing to do")
            return prior.directory
        made = finish(args, prior, left)
    say_what_was_made(args, made, len(left.steps))
    return prior.directory


def finish(args: argparse.Namespace, prior: Prior, left: Left) -> Prior:
    """Run what is left of a prior whose folder is locked."""
    from step_skip.schedule import check_installed_schedule

    m = prior.metadata
    device = pick_device(m["model"], args.device or m["device"])
    check_same_machine(prior, device)
    check_installed_schedule(prior)
    check_folder(prior.directory, bytes_needed(prior, videos=len(left.videos)))
    if args.preview:
        check_previewable(prior)
    start = read_own_images(prior) if left.start_step is None else None
    loras = find_recorded_loras(m.get("lora", [])) if left.components else ()
    settings, computes = prior.settings, (m.get("quantize"), m.get("compile"))
    options = LoadOptions(m["model"], device, m["dtype"], args.vram, args.model_dir, loras, *computes)
    options = dataclasses.replace(options, size=settings.size, tiled=settings.tiled)
    log.info(f"{len(left.steps)} of {prior.num_inference_steps} steps are left to run")
    clock = Clock()
    clock.include(m.get("seconds", {}))
    model = None
    if left.components:
        check = functools.partial(check_fingerprint, prior)
        model = load_told(options, left.components, check=check, by_expert=True)
    clock.add("load")
    with saying_how_to_go_on(args, [prior.directory]):
        writer = PriorWriter(prior.directory, dict(m))
        callback = preview_in([prior.directory]) if args.preview else None
        run_what_is_left(writer, left, model=model, start=start, clock=clock, callback=callback)
    return writer.prior


def preview_in(begun: list[Path]) -> ProgressCallback:
    """What writes the preview of a prior; by the time a step has run its folder is the first of these."""
    return lambda *step: preview_to(begun[0], begun[0] / PREVIEW_FILE)(*step)


# --- what the user is told ----------------------------------------------------------------------------------


@contextlib.contextmanager
def saying_how_to_go_on(args: argparse.Namespace, begun: list[Path]) -> Iterator[None]:
    """Where a run that had begun is cut short, say in one line how to go on with what is whole.

    Args:
        begun: the prior's folder, once there is something in it.
    """
    try:
        yield
    except RunError:  # going on would only fail again
        raise
    except BaseException:
        if begun and (begun[0] / METADATA_FILE).exists():
            again = command_line(args, "generate_prior.py", "--resume", begun[0])
            log.info(f"every whole step is kept; go on with: {again}")
        raise


def say_what_it_costs(planned: Prior, number: int) -> None:
    """Tell what priors cost once, and what each new prompt will."""
    steps = planned.num_inference_steps
    forwards = sum(1 if scale == 1 else 2 for scale in planned.guidance)
    chosen = recommended_num_steps(steps)
    each = chosen if forwards == steps else 2 * chosen - 1
    log.info(
        f"{number} x {steps} steps, {forwards} forwards and about {bytes_of_steps(planned) / 1e6:.0f} MB "
        f"each; a new prompt then takes {each} forwards, and prior_utils.py prune makes a prior smaller"
    )


def say_what_was_made(args: argparse.Namespace, prior: Prior, steps_run: int) -> None:
    """Sum up a prior and say what can be done with it."""
    m, directory = prior.metadata, prior.directory
    steps = m["num_inference_steps"]
    resumed = f'{command_line(args, "infer_from_prior.py", "--prior_dir", directory)} --prompt "..."'
    cost = f"{steps_run} steps, {m['forwards']} forwards, {describe_seconds(m['seconds'])}"
    log.info(f"{directory}: {cost}; {describe_peak(m['peak_memory'])}")
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


def main(argv: list[str] | None = None) -> str:
    """Make or finish priors and return their folders, one a line."""
    args = parse_args(argv)
    folders = make_priors(args) if args.resume is None else [resume(args)]
    return "\n".join(map(str, folders))


def command() -> None:
    """The console script of an installed package."""
    cli.run_script(main)


if __name__ == "__main__":
    command()
