"""Make a prior: one full run for an identity, with the latents of every step kept.

    python generate_prior.py --model tiny --image data/tiny_wan_i2v/inputs/mila.png
    python generate_prior.py --download_example --prompt "A small boat sails bravely through the waves."

infer_from_prior.py then makes new videos of the same identity from it, in a fraction of the steps.
The last line on stdout is the prior's folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import command_line as cli
import formation
import prior_utils
import wan_models
from prior_utils import Clock, InputError, RunError, RunSettings

if TYPE_CHECKING:
    import torch
    from diffsynth.pipelines.wan_video import WanVideoPipeline
    from PIL.Image import Image

    from wan_pipeline import Conditioning, RunResult, Step

EXAMPLE_IMAGE = wan_models.ROOT / "data" / "examples" / "wan" / "input_image.jpg"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and fill in the model's own defaults."""
    parser = cli.Parser(__doc__)
    add_identity_arguments(parser)
    add_run_arguments(parser)
    add_output_arguments(parser)
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
    if args.start_step is None:
        args.start_step = prior_utils.recommended_start_step(args.num_inference_steps)
    return args


def add_identity_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says who is seen and what happens."""
    group = parser.add_argument_group("identity")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--image", type=Path, metavar="FILE", help="picture of the identity, the first frame of every video"
    )
    source.add_argument(
        "--download_example", action="store_true", help="fetch DiffSynth's example image and use it"
    )
    group.add_argument(
        "--prompt",
        type=cli.utf8_text,
        default="",
        metavar="TEXT",
        help="what happens in the prior's own video; leave it out for a neutral prior, which later prompts "
        "can move more freely",
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
        "--run_id", metavar="ID", help="letters, digits, . _ and - (default: the date and time)"
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
    if args.run_id is not None and not re.fullmatch(r"[\w.-]+", args.run_id, flags=re.ASCII):
        raise InputError(f"--run_id {args.run_id!r}: use letters, digits, . _ and - only")


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
    """The metadata that is known before the run.

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
        "prior_kind": "prompted" if args.prompt else "neutral",
        "scheduler_timesteps": timesteps,
        "scheduler_sigmas": sigmas,
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        "start_step": args.start_step,
        "fps": args.fps,
        "model": args.model,
        "lora": [],
        "dtype": args.dtype,
        **TILING,
        **cli.machine(device),
        "versions": cli.versions(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
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
    )


def bytes_needed(settings: RunSettings, *, videos: int) -> int:
    """A safe upper bound of what the prior takes on disk."""
    shape = prior_utils.latents_shape(
        height=settings.height, width=settings.width, num_frames=settings.num_frames
    )
    latents = math.prod(shape) * 4
    saved = 2 * settings.num_inference_steps + 4  # latents and velocity of each step, the noise, y
    return saved * latents + videos * cli.video_bytes(settings) + 32 * 2**20


def read_inputs(args: argparse.Namespace, settings: RunSettings) -> tuple[Image, list[Image] | None]:
    """The input image and, for --denoising_strength below 1, the frames of the input video."""
    image = cli.read_image(args.image, width=settings.width, height=settings.height)
    if args.input_video is None:
        return image, None
    sizes = {"width": settings.width, "height": settings.height, "num_frames": settings.num_frames}
    return image, cli.read_video(args.input_video, **sizes)


def save_conditioning(
    writer: prior_utils.PriorWriter,
    args: argparse.Namespace,
    latents: torch.Tensor,
    conditioning: Conditioning,
) -> None:
    """Save what a resumed run needs in place of image, image encoder and text encoder."""
    writer.save_tensor(prior_utils.INITIAL_LATENTS_FILE, latents)
    tensors = {
        "y.pt": conditioning.y,
        "clip_feature.pt": conditioning.clip_feature,
        prior_utils.context_file(args.prompt): conditioning.context_posi,
        prior_utils.context_file(args.negative_prompt): conditioning.context_nega,
    }
    for name, tensor in tensors.items():
        if tensor is not None:
            writer.save_tensor(name, tensor)


def save_step(writer: prior_utils.PriorWriter, step: Step) -> None:
    """Save the latents after a step and its guided velocity, then say so in the metadata."""
    writer.save_tensor(prior_utils.noise_pred_file(step.index), step.noise_pred)
    writer.save_tensor(prior_utils.step_file(step.index), step.latents)
    formation.record_step(writer.metadata, step)
    writer.write_metadata()


def save_denoised_videos(
    writer: prior_utils.PriorWriter,
    pipe: WanVideoPipeline,
    *,
    denoised: list[torch.Tensor],
    tiled: bool,
    fps: float,
    clock: Clock,
) -> None:
    """Decode each step's denoised estimate: shows when the identity has formed.

    Done after the run, so that the network never has to make room for the VAE between two steps.
    """
    from tqdm import tqdm

    from wan_pipeline import decode

    for index, latents in enumerate(tqdm(denoised, desc="decode estimates", unit="video")):
        frames = decode(pipe, latents, tiled=tiled)
        clock.add("decode_estimates")
        writer.save(f"denoised_{index:04d}.mp4", lambda path, f=frames: cli.write_video(f, path, fps=fps))
        clock.add("save")


def run(
    args: argparse.Namespace,
    settings: RunSettings,
    *,
    writer: prior_utils.PriorWriter,
    pipe: WanVideoPipeline,
    image: Image,
    input_video: list[Image] | None,
    clock: Clock,
) -> RunResult:
    """Run all steps, saving each as it comes, then the videos."""
    from wan_pipeline import run_full

    denoised = []

    def on_step(step: Step) -> None:
        save_step(writer, step)
        if args.save_decoded_videos:
            denoised.append(step.denoised.cpu())

    result = run_full(
        pipe,
        settings,
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        input_image=image,
        input_video=input_video,
        on_start=lambda latents, conditioning: save_conditioning(writer, args, latents, conditioning),
        on_step=on_step,
    )
    clock.include(result.seconds)
    writer.save(prior_utils.OUTPUT_FILE, lambda path: cli.write_video(result.frames, path, fps=args.fps))
    formation.save(writer)
    clock.add("save")
    if denoised:
        save_denoised_videos(writer, pipe, denoised=denoised, tiled=settings.tiled, fps=args.fps, clock=clock)
    return result


def resume_command(args: argparse.Namespace, directory: Path) -> str:
    """The command line that resumes from the prior, from where the user is."""
    script = Path(__file__).resolve().with_name("infer_from_prior.py")
    if script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    words = ["python", script, "--prior_dir", directory]
    for name, default in (("model_dir", None), ("device", None), ("vram", "auto")):
        if getattr(args, name) != default:
            words += [f"--{name}", getattr(args, name)]
    return f'{shlex.join(map(str, words))} --prompt "..."'


def main(argv: list[str] | None = None) -> Path:
    """Make one prior and return its folder."""
    args = parse_args(argv)
    check_args(args)
    settings = run_settings(args)
    videos = 1 + settings.num_inference_steps * args.save_decoded_videos
    cli.check_folder(args.output_dir, bytes_needed(settings, videos=videos))
    prior_utils.check_run_id(args.output_dir, args.run_id)
    device = wan_models.pick_device(args.model, args.device)
    metadata = describe(args, settings, device=device)
    if args.download_example:
        args.image = download_example()
    image, video = read_inputs(args, settings)
    options = dataclasses.replace(cli.load_options(args), device=device)
    files = wan_models.weight_files(options)
    metadata["model_fingerprint"] = wan_models.fingerprint(files)

    clock = Clock()
    pipe = wan_models.load_pipeline(options, files)
    clock.add("load")
    directory, run_id = prior_utils.create_run_dir(args.output_dir, args.run_id)
    writer = prior_utils.PriorWriter(directory, {"run_id": run_id} | metadata)
    writer.save(prior_utils.IMAGE_FILE, image.save)
    result = run(args, settings, writer=writer, pipe=pipe, image=image, input_video=video, clock=clock)
    writer.finish(
        forwards=result.forwards,
        latents_sha256=prior_utils.sha256_tensor(result.latents),
        seconds=clock.seconds,
        seconds_per_step=result.seconds_per_step,
    )
    steps, seconds = settings.num_inference_steps, sum(clock.seconds.values())
    cli.say(
        f"{directory}: {len(result.steps)} steps, {result.forwards} forwards, {seconds:.1f} s\n"
        f"A new prompt in {prior_utils.recommended_num_steps(steps)} of {steps} steps:\n"
        f"  {resume_command(args, directory)}\n"
        f"Or resumed after step {args.start_step}, {steps - args.start_step - 1} of {steps} steps:\n"
        f"  {resume_command(args, directory)} --start_step {args.start_step}"
    )
    return directory


if __name__ == "__main__":
    cli.run_script(main)
