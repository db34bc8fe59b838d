"""Make a prior: one full run for an identity, with the latents of every step kept.

    python generate_prior.py --model tiny --image data/tiny_wan_i2v/inputs/mila.png
    python generate_prior.py --download_example --prompt "A small boat sails bravely through the waves."
    python generate_prior.py --image ann.jpg ben.jpg --stop_after 3
    python generate_prior.py --resume prior_output/run_<id>

infer_from_prior.py then makes new videos of the same identity from it, in a fraction of the steps.
Several images share one loading of the model; stopped after a step, a prior is a draft with a preview.
--resume goes on after the last whole step of a run that was interrupted or stopped, and makes again what was
damaged. The last lines on stdout are the priors' folders.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import re
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import command_line as cli
import lora
import prior_run
import prior_utils
import prior_writer
import wan_models
from plan import check_schedule
from prior_utils import Clock, InputError, RunError, RunSettings
from prior_writer import PriorWriter
from wan_models import LoadOptions

if TYPE_CHECKING:
    from diffsynth.pipelines.wan_video import WanVideoPipeline
    from PIL.Image import Image

EXAMPLE_IMAGE = wan_models.ROOT / "data" / "examples" / "wan" / "input_image.jpg"
RESUME_FLAGS = {"--resume", "--model_dir", "--device", "--vram"}


@dataclass(frozen=True)
class Wanted:
    """One prior to make."""

    image: Image  # of the video's size
    prompt: str
    run_id: str | None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and fill in the model's own defaults."""
    parser = cli.Parser(__doc__)
    add_identity_arguments(parser)
    add_run_arguments(parser)
    add_output_arguments(parser)
    cli.add_cheaper_arguments(parser, lora_help="resumed runs take the same unless told otherwise")
    cli.add_model_arguments(
        parser,
        model="I2V-480P",
        model_help="tiny runs on a CPU, the others need CUDA",
        dtype_help="(default: bfloat16; tiny: float32)",
    )
    args = parser.parse_args(argv)
    defaults = wan_models.model_defaults(args.model, args.model_dir)
    for name, value in dataclasses.asdict(defaults).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.resume is not None:
        settings = sorted(cli.given_flags(argv) - RESUME_FLAGS)
        if settings:
            parser.error(f"--resume takes every setting from its run: leave out {settings[0]}")
    if args.start_step is None:
        args.start_step = prior_utils.recommended_start_step(args.num_inference_steps)
    return args


def add_identity_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says who is seen and what happens."""
    group = parser.add_argument_group("identity")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--image",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="picture of the identity, the first frame of every video; of several, each becomes a prior",
    )
    source.add_argument(
        "--download_example", action="store_true", help="fetch DiffSynth's example image and use it"
    )
    source.add_argument(
        "--resume",
        type=cli.utf8_path,
        metavar="RUN_DIR",
        help="finish this prior; its settings are recorded, so only --model_dir, --device and --vram go with "
        "it",
    )
    group.add_argument(
        "--prompt",
        type=cli.utf8_text,
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="what happens in the prior's own video; best is one that holds still, 'she stays still', or for "
        "--start_step none at all, a neutral prior; one for all images or one for each",
    )
    group.add_argument(
        "--negative_prompt",
        type=cli.utf8_text,
        metavar="TEXT",
        help="what to steer away from (default: Wan's usual one; tiny: none)",
    )
    group.add_argument(
        "--input_video",
        type=Path,
        metavar="FILE",
        help="start from this video; needs --denoising_strength below 1",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what fixes schedule, noise and size."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--num_inference_steps", type=cli.positive_int, default=10, metavar="N", help="steps of the full run"
    )
    group.add_argument(
        "--sigma_shift",
        type=cli.positive_float,
        metavar="X",
        help="how much of the schedule is spent at high noise (default: 5)",
    )
    group.add_argument(
        "--denoising_strength",
        type=cli.strength,
        default=1.0,
        metavar="X",
        help="below 1: start from --input_video with less noise",
    )
    group.add_argument(
        "--cfg_scale",
        type=cli.positive_float,
        metavar="X",
        help="how strongly the prompt is followed; 1 switches guidance off and halves the cost "
        "(default: 5; tiny: 2)",
    )
    group.add_argument(
        "--stop_after",
        type=cli.non_negative_int,
        metavar="N",
        help="stop after this step and decode what it points at: a draft, that infer_from_prior.py resumes "
        "from this step or an earlier one, and --resume finishes",
    )
    group.add_argument(
        "--seed", type=cli.limited("seed", int), default=0, metavar="N", help="of the initial noise"
    )
    sizes = parser.add_argument_group(
        "video",
        "sizes are rounded up as the model needs (default: 480 x 832, 81 frames; I2V-720P: 720 x 1280; "
        "tiny: 96 x 96, 17)",
    )
    for name, unit in (("height", "pixels"), ("width", "pixels"), ("num_frames", "frames")):
        sizes.add_argument(f"--{name}", type=cli.limited(name, int), metavar="N", help=unit)
    sizes.add_argument(
        "--fps",
        type=cli.limited("fps", float),
        metavar="X",
        help="frames per second (default: 16; tiny: 8)",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where the prior goes and what else is kept."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_dir",
        type=cli.utf8_path,
        default=Path("prior_output"),
        metavar="DIR",
        help="the prior is run_<id> in there",
    )
    group.add_argument(
        "--run_id",
        nargs="+",
        metavar="ID",
        help="letters, digits, . _ and -, one for each image (default: the date and time)",
    )
    group.add_argument(
        "--start_step",
        type=cli.non_negative_int,
        metavar="N",
        help="recorded as the recommendation for infer_from_prior.py; does not change this run "
        "(default: 6 of 10)",
    )
    group.add_argument(
        "--save_decoded_videos", action="store_true", help="also a video of each step's denoised estimate"
    )


def check_args(args: argparse.Namespace) -> None:
    """Refuse what no run could use, before anything heavy is imported.

    Raises:
        InputError: with the flag that is wrong.
    """
    if args.num_inference_steps > prior_utils.MAX_STEPS:
        raise InputError(f"--num_inference_steps {args.num_inference_steps}: at most {prior_utils.MAX_STEPS}")
    if args.start_step >= args.num_inference_steps:
        last = args.num_inference_steps - 1
        raise InputError(f"--start_step {args.start_step}: this schedule has steps 0 to {last}")
    if args.denoising_strength < 1 and args.input_video is None:
        raise InputError(
            f"--denoising_strength {args.denoising_strength} starts from a video: give --input_video"
        )
    if args.input_video is not None and args.denoising_strength == 1:
        raise InputError(
            "--input_video is not used at --denoising_strength 1: give a strength below 1, 0.7 say"
        )
    if args.stop_after is not None and args.stop_after >= args.num_inference_steps - 1:
        raise InputError(
            f"--stop_after {args.stop_after}: expected 0 to {args.num_inference_steps - 2}; "
            "leave it out to run all steps"
        )
    for run_id in args.run_id or ():
        if not re.fullmatch(r"[\w.-]+", run_id, flags=re.ASCII):
            raise InputError(f"--run_id {run_id!r}: use letters, digits, . _ and - only")
        prior_writer.check_run_id(args.output_dir, run_id)


def download_example() -> Path:
    """Fetch DiffSynth's example image into data/examples/wan, once.

    Raises:
        RunError: it could not be fetched.
    """
    if EXAMPLE_IMAGE.is_file():
        return EXAMPLE_IMAGE
    from modelscope import dataset_snapshot_download

    try:
        dataset_snapshot_download(
            "DiffSynth-Studio/examples_in_diffsynth",
            local_dir=str(wan_models.ROOT),
            allow_file_pattern=str(EXAMPLE_IMAGE.relative_to(wan_models.ROOT)),
        )
    except Exception as error:  # modelscope, requests and urllib3 each raise their own
        raise RunError(
            f"cannot fetch the example image from ModelScope ({type(error).__name__}): connect to the "
            "network, or give an image of your own with --image"
        ) from error
    return EXAMPLE_IMAGE


def describe(args: argparse.Namespace, settings: RunSettings, *, device: str) -> dict[str, Any]:
    """The metadata that is known before the run, but for the prompt.

    Raises:
        InputError: the schedule is one that can't be resumed.
    """
    from wan_pipeline import TILING, compute_schedule

    timesteps, sigmas = compute_schedule(
        num_inference_steps=settings.num_inference_steps,
        denoising_strength=settings.denoising_strength,
        sigma_shift=settings.sigma_shift,
    )
    prior_utils.check_distinct(timesteps)
    return {
        **dataclasses.asdict(settings),
        "scheduler_timesteps": timesteps,
        "scheduler_sigmas": sigmas,
        "negative_prompt": args.negative_prompt,
        "start_step": args.start_step,
        "stop_after": args.stop_after,
        "save_decoded_videos": args.save_decoded_videos,
        "fps": args.fps,
        "model": args.model,
        "lora": lora.describe(args.lora or ()),
        "dtype": args.dtype,
        **TILING,
        **cli.machine(device),
        "versions": cli.versions(),
    }


def run_settings(args: argparse.Namespace) -> RunSettings:
    """The settings of the run, with the sizes rounded as the pipeline would."""
    wanted = {"height": args.height, "width": args.width, "num_frames": args.num_frames}
    sizes = prior_utils.round_sizes(**wanted)
    if sizes != wanted:
        cli.say(
            "size rounded up to {width} x {height} pixels, {num_frames} frames, as the model needs".format(
                **sizes
            )
        )
    return RunSettings(
        num_inference_steps=args.num_inference_steps,
        denoising_strength=args.denoising_strength,
        sigma_shift=args.sigma_shift,
        cfg_scale=args.cfg_scale,
        seed=args.seed,
        **sizes,
        **cli.cheaper_settings(args, args.model),
    )


def bytes_needed(settings: RunSettings, *, videos: int) -> int:
    """A safe upper bound of what the prior takes on disk."""
    shape = prior_utils.latents_shape(
        height=settings.height, width=settings.width, num_frames=settings.num_frames
    )
    latents = math.prod(shape) * 4
    saved = 2 * settings.num_inference_steps + 4  # latents and velocity of each step, the noise, y
    return saved * latents + videos * cli.video_bytes(settings) + 32 * 2**20


def read_wanted(args: argparse.Namespace, settings: RunSettings) -> list[Wanted]:
    """The priors to make: one for each image, each with its prompt.

    Raises:
        InputError: an image that can't be used, a --run_id given twice, or as many prompts or ids as fit
            no reading.
    """
    number = len(args.image)
    prompts = args.prompt * number if len(args.prompt) == 1 else args.prompt
    run_ids = args.run_id or [None] * number
    for flag, values in (("--prompt", prompts), ("--run_id", run_ids)):
        if len(values) != number:
            raise InputError(f"{flag}: {len(values)} for {number} images; give one for each image")
    for run_id in run_ids:
        if run_id is not None and run_ids.count(run_id) > 1:
            raise InputError(f"--run_id {run_id}: given twice; every prior needs its own")
    sizes = {"width": settings.width, "height": settings.height}
    images = [cli.read_image(path, **sizes) for path in args.image]
    return [Wanted(*each) for each in zip(images, prompts, run_ids, strict=True)]


def read_input_video(args: argparse.Namespace, settings: RunSettings) -> list[Image] | None:
    """The frames of the input video, for --denoising_strength below 1."""
    if args.input_video is None:
        return None
    sizes = {"width": settings.width, "height": settings.height, "num_frames": settings.num_frames}
    return cli.read_video(args.input_video, **sizes)


# --- making and finishing priors ----------------------------------------------------------------------------


def make_priors(args: argparse.Namespace) -> list[Path]:
    """Make a prior of every image on one loaded pipeline, and return their folders."""
    settings = run_settings(args)
    videos = 1 + settings.num_inference_steps * args.save_decoded_videos
    number = 1 if args.image is None else len(args.image)
    cli.check_folder(args.output_dir, number * bytes_needed(settings, videos=videos))
    device = wan_models.pick_device(args.model, args.device)
    metadata = describe(args, settings, device=device)
    if args.download_example:
        args.image = [download_example()]
    wanted, input_video = read_wanted(args, settings), read_input_video(args, settings)
    options = dataclasses.replace(cli.load_options(args), device=device)
    files = wan_models.weight_files(
        options, [*wan_models.COMPONENTS, *wan_models.cache_components(settings.skip_cache)]
    )
    for note in lora.check_loras(options.loras, files["dit"]):
        cli.warn(note)
    metadata["model_fingerprint"] = wan_models.fingerprint(files)

    clock = Clock()
    pipe = wan_models.load_pipeline(options, files)
    clock.add("load")
    made, failed = [], []
    for number, each in enumerate(wanted):
        try:
            made.append(make_prior(each, args, metadata, pipe=pipe, input_video=input_video, clock=clock))
        except RunError as error:  # NaN, for example: the next image may do better
            if len(wanted) == 1:
                raise
            failed.append(f"{args.image[number]}: {error}")
        clock = Clock()
    if failed:
        raise RunError(f"{len(failed)} of {len(wanted)} priors failed: {'; '.join(failed)}")
    return made


def make_prior(
    wanted: Wanted,
    args: argparse.Namespace,
    metadata: Mapping[str, Any],
    *,
    pipe: WanVideoPipeline,
    input_video: list[Image] | None,
    clock: Clock,
) -> Path:
    """Make one prior and return its folder."""
    directory, run_id = prior_writer.create_run_dir(args.output_dir, wanted.run_id)
    own = {
        "run_id": run_id,
        "prompt": wanted.prompt,
        "prior_kind": "prompted" if wanted.prompt else "neutral",
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds_per_step": [],
        "forwards_per_step": [],
    }
    with prior_writer.locked(directory), saying_how_to_go_on(args, directory):
        writer = PriorWriter(directory, own | metadata)
        writer.save(prior_utils.IMAGE_FILE, wanted.image.save)
        writer.write_metadata()  # from here on --resume can finish it
        left = prior_run.what_is_left(writer.prior)
        prior_run.run(writer, left, pipe=pipe, image=wanted.image, input_video=input_video, clock=clock)
    say_what_was_made(args, writer, left)
    return directory


def resume(args: argparse.Namespace) -> Path:
    """Finish a prior that was interrupted, stopped or damaged, and return its folder.

    Raises:
        InputError: it can't be finished as the run that was begun would have.
    """
    prior_utils.read_run(args.resume)  # says what is wrong with the folder before it is locked
    with prior_writer.locked(args.resume):
        prior = prior_utils.read_run(args.resume)
        prior_run.check_resumable(prior)
        left = prior_run.what_is_left(prior)
        if prior.is_complete:
            prior_utils.check_files(prior, [prior_utils.IMAGE_FILE])  # the one that can't be made again
        if prior.is_complete and not left.damaged and not left.components:
            cli.say(f"{prior.directory} is complete and undamaged: nothing to do")
            return prior.directory
        device = wan_models.pick_device(prior.metadata["model"], args.device or prior.metadata["device"])
        prior_run.check_same_machine(prior, device)
        check_schedule(prior)
        cli.check_folder(prior.directory, bytes_needed(prior.settings, videos=len(left.videos)))
        image = prior_run.read_own_image(prior) if left.start_step is None else None
        m = prior.metadata
        loras = lora.recorded(m.get("lora", []))
        options = LoadOptions(m["model"], device, m["dtype"], args.vram, args.model_dir, loras)
        files = wan_models.weight_files(options, left.components)
        prior_utils.check_fingerprint(prior, wan_models.fingerprint(files))
        cli.say(f"{len(left.steps)} of {prior.num_inference_steps} steps are left to run")
        clock = Clock()
        clock.include(m.get("seconds", {}))
        pipe = wan_models.load_pipeline(options, files) if files else None
        clock.add("load")
        with saying_how_to_go_on(args, prior.directory):
            writer = PriorWriter(prior.directory, dict(m))
            prior_run.run(writer, left, pipe=pipe, image=image, input_video=None, clock=clock)
    say_what_was_made(args, writer, left)
    return prior.directory


# --- what the user is told ----------------------------------------------------------------------------------


@contextlib.contextmanager
def saying_how_to_go_on(args: argparse.Namespace, directory: Path) -> Iterator[None]:
    """Where a run that had begun is cut short, say in one line how to go on with what is whole."""
    try:
        yield
    except RunError:  # going on would only fail again
        raise
    except BaseException:
        if (directory / prior_utils.METADATA_FILE).exists():
            again = command(args, "generate_prior.py", "--resume", directory)
            cli.say(f"every whole step is kept; go on with: {again}")
        raise


def say_what_was_made(args: argparse.Namespace, writer: PriorWriter, left: prior_run.Left) -> None:
    """Sum up a prior and say what can be done with it."""
    m, directory = writer.metadata, writer.directory
    steps, seconds = m["num_inference_steps"], sum(m["seconds"].values())
    resumed = f'{command(args, "infer_from_prior.py", "--prior_dir", directory)} --prompt "..."'
    cli.say(f"{directory}: {len(left.steps)} steps, {m['forwards']} forwards, {seconds:.1f} s")
    if m["status"] == "stopped":
        preview = directory / prior_utils.denoised_file(left.last_step)
        cli.say(
            f"Stopped after step {left.last_step} of {steps}; what it points at: {preview}\n"
            f"Finished with a new prompt:\n"
            f"  {resumed}\n"
            f"Or with its own, as if never stopped:\n"
            f"  {command(args, 'generate_prior.py', '--resume', directory)}"
        )
        return
    start_step = m["start_step"]
    cli.say(
        f"A new prompt in {prior_utils.recommended_num_steps(steps)} of {steps} steps:\n"
        f"  {resumed}\n"
        f"Or resumed after step {start_step}, {steps - start_step - 1} of {steps} steps:\n"
        f"  {resumed} --start_step {start_step}"
    )


def command(args: argparse.Namespace, name: str, *words: object) -> str:
    """A command line of one of the scripts, from where the user is, with the same model and device."""
    script = Path(__file__).resolve().with_name(name)
    if script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    words = ["python", script, *words]
    for flag, default in (("model_dir", None), ("device", None), ("vram", "auto")):
        if getattr(args, flag) != default:
            words += [f"--{flag}", getattr(args, flag)]
    return shlex.join(map(str, words))


def main(argv: list[str] | None = None) -> str:
    """Make or finish priors and return their folders, one a line."""
    args = parse_args(argv)
    if args.resume is not None:
        return str(resume(args))
    check_args(args)
    return "\n".join(map(str, make_priors(args)))


if __name__ == "__main__":
    cli.run_script(main)
