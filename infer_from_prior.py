"""Make a new video from a prior: load the latents after a step, run only the steps after it.

    python infer_from_prior.py --prior_dir prior_output/run_<id> --start_step 6 --prompt "She looks up."

Without --prompt the prior's own prompt is used, and the video is the prior's own, bit for bit.
The last line on stdout is the video; a .json file beside it says how it was made.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import command_line as cli
import prior_utils
import wan_models
from prior_utils import InputError, Prior, RunSettings

if TYPE_CHECKING:
    import torch
    from diffsynth.pipelines.wan_video import WanVideoPipeline

    from wan_pipeline import Conditioning, RunResult

IDENTITY_FILES = ("y.pt", "clip_feature.pt")
SCHEDULE_FLAGS = ("num_inference_steps", "denoising_strength", "sigma_shift")


class Start(NamedTuple):
    """What a run reads from the prior; see `latents_files`, `velocity_files` and `conditioning_files`."""

    latents: list[torch.Tensor]
    noise_pred: list[torch.Tensor]
    conditioning: dict[str, torch.Tensor]  # by file name


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; what is left out is taken from the prior later."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--prior_dir", type=cli.utf8_path, required=True, help="a run_<id> folder of generate_prior.py"
    )
    method = parser.add_mutually_exclusive_group()
    method.add_argument(
        "--start_step",
        type=cli.non_negative_int,
        help="resume after this step; early: the prompt decides more, late: it costs less; the last step "
        "only decodes; without it the prior's recommendation",
    )
    method.add_argument(
        "--steps",
        type=cli.non_negative_int,
        nargs="+",
        metavar="STEP",
        help="differential resume: run only these steps, spent on what the new prompt changes (2 5 8, say)",
    )
    method.add_argument("--num_steps", type=cli.positive_int, help="differential resume with this many steps")
    parser.add_argument(
        "--prompt", type=cli.utf8_text, help="the new motion; without it the prior's own prompt"
    )
    parser.add_argument("--negative_prompt", type=cli.utf8_text, help="without it the prior's")
    parser.add_argument(
        "--cfg_scale", type=cli.positive_float, help="guidance; 1 halves the cost; without it the prior's"
    )
    parser.add_argument(
        "--output",
        type=cli.utf8_path,
        help="the .mp4; without it one in the prior's outputs folder, named after step and prompt",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    check = parser.add_argument_group("checked against the prior, if given")
    check.add_argument("--image", type=Path, help="the prior's input image")
    check.add_argument("--num_inference_steps", type=cli.positive_int)
    check.add_argument("--denoising_strength", type=cli.strength)
    check.add_argument("--sigma_shift", type=cli.positive_float)
    cli.add_model_arguments(parser, model=None, dtype_help="the prior's, which is used without it")
    return parser.parse_args(argv)


def fill_in(args: argparse.Namespace, prior: Prior) -> None:
    """Take from the prior what the command line left open, and refuse what contradicts it.

    Raises:
        InputError: with the flag, the prior's value and what to do.
    """
    recorded = prior.metadata
    for name in (*SCHEDULE_FLAGS, "model", "dtype"):
        given = getattr(args, name)
        if given is not None and given != recorded.get(name, given):
            raise InputError(
                f"--{name} {given}: the prior has {recorded[name]}; "
                "leave the flag out or make a prior with it"
            )
    choose_steps(args, prior)
    args.model = args.model or recorded.get("model", "I2V-480P")
    if args.model not in wan_models.MODEL_NAMES:
        raise InputError(f"the prior was made with the model {args.model!r}, which this version doesn't know")
    defaults = wan_models.model_defaults(args.model, args.model_dir)
    for name in ("negative_prompt", "cfg_scale", "fps"):
        if getattr(args, name, None) is None:
            setattr(args, name, recorded.get(name, getattr(defaults, name)))
    if prior.is_legacy:
        fill_in_legacy(args, prior)
    elif args.prompt is None:
        args.prompt = recorded["prompt"]


def choose_steps(args: argparse.Namespace, prior: Prior) -> None:
    """Set args.steps_to_run; args.start_step is None for a differential resume.

    Raises:
        InputError: a step the prior doesn't have, or a prior without what a differential resume needs.
    """
    total = prior.num_inference_steps
    if args.num_steps is not None:
        if args.num_steps > total:
            raise InputError(f"--num_steps {args.num_steps}: the prior has only {total} steps")
        args.steps = prior_utils.spread_steps(total, args.num_steps)
    if args.steps is None:
        if args.start_step is None:
            args.start_step = prior.metadata.get("start_step", prior_utils.recommended_start_step(total))
        if args.start_step >= total:
            raise InputError(f"--start_step {args.start_step}: the prior has steps 0 to {total - 1}")
        args.steps_to_run = list(range(args.start_step + 1, total))
        return
    if sorted(set(args.steps)) != args.steps or args.steps[-1] >= total:
        raise InputError(f"--steps {args.steps}: expected increasing steps between 0 and {total - 1}")
    if prior.is_legacy:
        raise InputError(
            "--steps needs the prior's velocities, which this older format lacks; use --start_step"
        )
    args.steps_to_run = args.steps


def fill_in_legacy(args: argparse.Namespace, prior: Prior) -> None:
    """A prior of the pull request's scripts says nothing of image, prompt and model: they must be given.

    Raises:
        InputError: one is missing.
    """
    for name in ("image", "prompt"):
        if getattr(args, name) is None:
            raise InputError(f"{prior.directory} records no {name} (an older format): give --{name}")
    cli.warn(
        f"{prior.directory} is of an older format, so these could not be checked: "
        f"model ({args.model} assumed), weights, image, prompts, cfg_scale, seed, checksums"
    )


def check_image(args: argparse.Namespace, prior: Prior) -> None:
    """Refuse an --image that is not the one the prior was made from.

    Raises:
        InputError: it differs.
    """
    if args.image is None:
        return
    sizes = {"width": prior.metadata["width"], "height": prior.metadata["height"]}
    given = cli.read_image(args.image, **sizes)
    if prior.is_legacy:
        return
    if given.tobytes() != cli.read_image(prior.directory / prior_utils.IMAGE_FILE, **sizes).tobytes():
        raise InputError(
            f"--image {args.image} is not the image the prior was made from "
            f"({prior.directory / prior_utils.IMAGE_FILE}); leave the flag out, or make a prior of this image"
        )


def texts(args: argparse.Namespace) -> list[str]:
    """The prompts this run needs encoded; without guidance the negative one is not used."""
    if not args.steps_to_run:
        return []
    return [args.prompt] if args.cfg_scale == 1 else [args.prompt, args.negative_prompt]


def latents_files(args: argparse.Namespace, prior: Prior) -> list[str]:
    """The latents this run starts from; for a differential resume those before each step, and the clean."""
    if args.start_step is not None:
        return [prior_utils.step_file(args.start_step)]
    last = prior_utils.step_file(prior.num_inference_steps - 1)
    return [*map(prior_utils.latents_before_file, args.steps), last]


def velocity_files(args: argparse.Namespace) -> list[str]:
    """The prior's velocities this run needs: those of the steps of a differential resume."""
    return [] if args.start_step is not None else [prior_utils.noise_pred_file(step) for step in args.steps]


def conditioning_files(args: argparse.Namespace, prior: Prior) -> list[str]:
    """The prior's conditioning this run needs; contexts of other prompts are not there."""
    if prior.is_legacy or not args.steps_to_run:
        return []
    contexts = dict.fromkeys(map(prior_utils.context_file, texts(args)))
    return [*IDENTITY_FILES, *filter(prior.has, contexts)]


def needed_files(args: argparse.Namespace, prior: Prior) -> list[str]:
    """The prior's files this run reads."""
    names = [*latents_files(args, prior), *velocity_files(args), *conditioning_files(args, prior)]
    if args.image is not None and not prior.is_legacy:
        names.append(prior_utils.IMAGE_FILE)
    return names


def needed_components(args: argparse.Namespace, prior: Prior) -> list[str]:
    """The parts of the model this run needs: encoders only for what the prior doesn't hold already."""
    if not args.steps_to_run:
        return ["vae"]
    components = ["dit", "vae"]
    if not all(prior.has(prior_utils.context_file(text)) for text in texts(args)):
        components.append("text_encoder")
    if prior.is_legacy:
        components.append("image_encoder")
    return components


def output_path(args: argparse.Namespace, prior: Prior) -> Path:
    """Where the video goes; nothing that exists is replaced unasked.

    Raises:
        InputError: --output exists, or is no .mp4.
    """
    if args.output is not None:
        if args.output.suffix != ".mp4":
            raise InputError(f"--output {args.output}: expected a name that ends in .mp4")
        taken = [path for path in (args.output, args.output.with_suffix(".json")) if path.exists()]
        if taken and not args.overwrite:
            raise InputError(f"--output: {taken[0]} exists; choose another name or add --overwrite")
        if any(path.is_dir() for path in taken):
            raise InputError(f"--output: {taken[0]} is a folder; choose another name")
        return args.output
    settings = json.dumps([args.prompt, args.negative_prompt, args.cfg_scale])
    start = f"step{args.start_step:02d}" if args.steps is None else "steps" + "-".join(map(str, args.steps))
    words = re.sub(r"[^a-z0-9]+", "-", args.prompt.lower())[:40].strip("-") or "no-prompt"
    stem = f"{start}_{words}_{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    path, again = prior.directory / "outputs" / f"{stem}.mp4", 1
    while path.exists() or path.with_suffix(".json").exists():
        again += 1
        path = path.with_name(f"{stem}_{again}.mp4")
    return path


def bytes_needed(settings: RunSettings) -> int:
    """A safe upper bound of what the video takes on disk."""
    return settings.num_frames * settings.height * settings.width * 3 // 4 + 2**20


def run_settings(args: argparse.Namespace, prior: Prior) -> RunSettings:
    """The prior's settings with this run's guidance."""
    names = {field.name for field in dataclasses.fields(RunSettings)}
    recorded = {name: value for name, value in prior.metadata.items() if name in names}
    return RunSettings(**{**recorded, "cfg_scale": args.cfg_scale})


def check_schedule(prior: Prior) -> None:
    """Recompute the schedule with the installed scheduler and compare every value.

    Raises:
        InputError: they differ.
    """
    from wan_pipeline import compute_schedule

    timesteps, sigmas = compute_schedule(**{name: prior.metadata[name] for name in SCHEDULE_FLAGS})
    prior_utils.check_schedule(prior, timesteps=timesteps, sigmas=sigmas)


def check_fingerprint(prior: Prior, found: dict[str, str]) -> None:
    """Compare the weights with those the prior was made with.

    Raises:
        InputError: they differ.
    """
    for component, digest in found.items():
        recorded = prior.metadata["model_fingerprint"].get(component) if not prior.is_legacy else digest
        if recorded != digest:
            raise InputError(
                f"the {component} weights are not those the prior was made with (fingerprint {digest[:12]}, "
                f"expected {str(recorded)[:12]}); name the right ones with --model_dir or make the prior "
                "again"
            )


def complete_conditioning(
    args: argparse.Namespace, prior: Prior, pipe: WanVideoPipeline, recorded: dict[str, torch.Tensor]
) -> Conditioning:
    """The prior's conditioning with this run's prompts; only what the prior lacks is encoded."""
    from wan_pipeline import Conditioning, encode_prompt

    identity = {Path(name).stem: recorded.get(name) for name in IDENTITY_FILES}
    if prior.is_legacy:
        identity = encode_identity(args, prior, pipe)
    contexts = {}
    for text in texts(args):
        name = prior_utils.context_file(text)
        contexts[text] = recorded[name] if name in recorded else encode_prompt(pipe, text)
    return Conditioning(
        **identity,
        context_posi=contexts[args.prompt],
        context_nega=None if args.cfg_scale == 1 else contexts[args.negative_prompt],
    )


def encode_identity(args: argparse.Namespace, prior: Prior, pipe: WanVideoPipeline) -> dict[str, Any]:
    """y and clip_feature of --image, for a prior that doesn't hold them."""
    from wan_pipeline import encode_image

    sizes = {name: prior.metadata[name] for name in ("width", "height")}
    image = cli.read_image(args.image, **sizes)
    return encode_image(pipe, image, num_frames=prior.metadata["num_frames"])


def run_steps(
    args: argparse.Namespace,
    pipe: WanVideoPipeline,
    settings: RunSettings,
    start: Start,
    conditioning: Conditioning | None,
) -> RunResult:
    """Run the steps that were chosen, one after the other or differentially."""
    from wan_pipeline import Trajectory, run_differential, run_from

    if args.start_step is not None:
        latents = start.latents[0]
        return run_from(
            pipe, settings, start_step=args.start_step, latents=latents, conditioning=conditioning
        )
    trajectory = Trajectory(args.steps, start.latents, start.noise_pred)
    return run_differential(pipe, settings, trajectory=trajectory, conditioning=conditioning)


def make_video(
    args: argparse.Namespace, prior: Prior, settings: RunSettings, start: Start, path: Path
) -> dict[str, Any]:
    """Load what is needed, run the steps that are left, write the video; returns the report."""
    from wan_pipeline import release

    options = cli.load_options(args)
    components = needed_components(args, prior)
    files = wan_models.weight_files(options, components)
    check_fingerprint(prior, wan_models.fingerprint(files))
    path.parent.mkdir(parents=True, exist_ok=True)

    watch = cli.Stopwatch()
    pipe = wan_models.load_pipeline(options, files)
    load_seconds = watch.lap()
    conditioning = None
    if args.steps_to_run:
        conditioning = complete_conditioning(args, prior, pipe, start.conditioning)
    release(pipe, ("text_encoder", "image_encoder"))
    encode_seconds = watch.lap()
    result = run_steps(args, pipe, settings, start, conditioning)
    watch.lap()
    cli.write_video(result.frames, path, fps=args.fps)
    result.seconds |= {"load": load_seconds, "encode": encode_seconds, "save": watch.lap()}
    return report(args, prior, settings, result, components)


def report(
    args: argparse.Namespace, prior: Prior, settings: RunSettings, result: RunResult, components: list[str]
) -> dict[str, Any]:
    """Everything needed to make the video again, and what it cost."""
    return {
        "prior_dir": str(prior.directory.absolute()),
        "prior_run_id": prior.metadata["run_id"],
        "prior_files": {
            name: prior.metadata.get("files", {}).get(name) for name in needed_files(args, prior)
        },
        "model": args.model,
        "method": "resume" if args.steps is None else "differential",
        "start_step": args.start_step,
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        **dataclasses.asdict(settings),
        "fps": args.fps,
        "dtype": args.dtype,
        "device": args.device,
        "components_loaded": components,
        "steps_run": result.steps,
        "steps_skipped": settings.num_inference_steps - len(result.steps),
        "forwards": result.forwards,
        "seconds": result.seconds,
        "seconds_per_step": result.seconds_per_step,
        "latents_sha256": prior_utils.sha256_tensor(result.latents),
        "versions": cli.versions(),
    }


def check_before_loading(args: argparse.Namespace, prior: Prior) -> tuple[RunSettings, Start]:
    """Everything that can be wrong without the model; returns the settings and what to start from.

    Raises:
        InputError: something is.
    """
    prior_utils.check_files(prior, needed_files(args, prior))
    check_image(args, prior)
    latents = [prior_utils.load_latents(prior, name) for name in latents_files(args, prior)]
    velocities = [prior_utils.load_latents(prior, name) for name in velocity_files(args)]
    conditioning = {
        name: prior_utils.load_tensor(prior.directory / name, dtype=prior.metadata["dtype"])
        for name in conditioning_files(args, prior)
    }
    found = str(latents[0].dtype).removeprefix("torch.")
    args.dtype = args.dtype or found
    if args.dtype != found:
        raise InputError(f"--dtype {args.dtype}: the prior's latents are {found}; leave the flag out")
    check_schedule(prior)
    return run_settings(args, prior), Start(latents, velocities, conditioning)


def main(argv: list[str] | None = None) -> Path:
    """Make one video and return its path."""
    args = parse_args(argv)
    prior = prior_utils.read_prior(args.prior_dir)
    fill_in(args, prior)
    path = output_path(args, prior)
    args.device = wan_models.pick_device(args.model, args.device)
    settings, start = check_before_loading(args, prior)
    cli.check_folder(path.parent, bytes_needed(settings))
    total, running = prior.num_inference_steps, len(args.steps_to_run)
    cli.say(
        f"runs {running} of {total} steps, skips {total - running}"
        if running
        else f"step {args.start_step} is the last: nothing left to run, decodes only"
    )
    data = make_video(args, prior, settings, start, path)
    prior_utils.write_json(path.with_suffix(".json"), data)
    cli.say(f"{path}: {data['forwards']} forwards, {sum(data['seconds'].values()):.1f} s")
    return path


if __name__ == "__main__":
    cli.run_script(main)
