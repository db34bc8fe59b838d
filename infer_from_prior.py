"""Make a new video of a prior's identity, in a fraction of the steps.

    python infer_from_prior.py --prior_dir prior_output/run_<id> --prompt "She looks up."
    python infer_from_prior.py --prior_dir prior_output/run_<id> --prompt "She looks up." --start_step 6

The first runs 3 of 10 steps, spread over the schedule and spent on what the new prompt changes: a
differential resume. The second loads the latents after step 6 and runs 7, 8, 9: late for a new motion.
Without --prompt the prior's own prompt is used, and the video is the prior's own, bit for bit.
The last line on stdout is the video; a .json file beside it says how it was made.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import command_line as cli
import prior_utils
import wan_models
from prior_utils import Clock, InputError, Prior, RunSettings
from wan_models import LoadOptions

if TYPE_CHECKING:
    import torch
    from diffsynth.pipelines.wan_video import WanVideoPipeline
    from PIL.Image import Image

    from wan_pipeline import Conditioning, RunResult

IDENTITY_FILES = ("y.pt", "clip_feature.pt")
LATE = 0.5  # share of the schedule after which a resumed run rarely changes the motion
# Clips of the embedded model that showed the new motion, resumed after 6 of 10, by the prior's kind; a full
# run: 80%. From benchmarks/results/promise/headline.md.
OBEYED_AFTER_6 = {"prompted": "10%", "neutral": "23%"}
SCHEDULE_FLAGS = ("num_inference_steps", "denoising_strength", "sigma_shift")
MAX_NAME_BYTES = 255  # of a file name, on every usual file system


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One video to make from a prior: every choice, nothing loaded."""

    method: str  # "resume": all steps after start_step; "differential": a few chosen steps
    start_step: int | None  # None for a differential resume
    steps_to_run: list[int]
    prompt: str
    negative_prompt: str
    cfg_scale: float
    fps: float
    image: Path | None  # an older prior needs it, others only compare it with their own
    model: str
    dtype: str | None  # None: the one an older prior's latents are in

    @property
    def texts(self) -> list[str]:
        """The prompts that have to be encoded; without guidance the negative one is not used."""
        if not self.steps_to_run:
            return []
        return [self.prompt] if self.cfg_scale == 1 else [self.prompt, self.negative_prompt]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a plan reads before any model is loaded."""

    latents: list[torch.Tensor]  # see latents_files
    noise_pred: list[torch.Tensor]  # see velocity_files
    conditioning: dict[str, torch.Tensor]  # by file name, see conditioning_files
    image: Image | None
    prior_files: dict[str, str]  # SHA-256 of the prior's files that were read
    image_sha256: str | None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; what is left out is taken from the prior later."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--prior_dir",
        type=cli.utf8_path,
        required=True,
        metavar="DIR",
        help="a run_<id> folder of generate_prior.py",
    )
    add_method_arguments(parser)
    add_prompt_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        type=cli.utf8_path,
        metavar="FILE",
        help="the .mp4 (default: one in the prior's outputs folder, named after steps and prompt)",
    )
    output.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    add_checked_arguments(parser)
    cli.add_model_arguments(
        parser,
        model=None,
        model_help="(default: the prior's; any other is refused)",
        dtype_help="(default: the prior's; any other is refused)",
    )
    args = parser.parse_args(argv)
    if args.overwrite and args.output is None:
        parser.error("--overwrite replaces what --output names: give --output")
    return args


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what chooses the steps that run."""
    group = parser.add_argument_group("steps, one of")
    method = group.add_mutually_exclusive_group()
    method.add_argument(
        "--start_step",
        type=cli.non_negative_int,
        metavar="N",
        help="resume after this step; early: the prompt decides more, late: it costs less; the last step "
        "only decodes; an older prior is resumed after 6 of 10 unless told otherwise",
    )
    method.add_argument(
        "--steps",
        type=cli.non_negative_int,
        nargs="+",
        metavar="N",
        help="differential resume: run only these steps, spent on what the new prompt changes "
        "(default: 3 of 10, 0 5 8)",
    )
    method.add_argument(
        "--num_steps",
        type=cli.positive_int,
        metavar="N",
        help="like --steps, spread over the schedule: of 10 steps 2 are 0 7, 3 are 0 5 8",
    )


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the new video shows."""
    group = parser.add_argument_group("prompt")
    group.add_argument(
        "--prompt",
        type=cli.utf8_text,
        metavar="TEXT",
        help="the new motion (default: the prior's own prompt)",
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
        metavar="X",
        help="how strongly the prompt is followed; 1 switches guidance off and halves the cost "
        "(default: the prior's)",
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


# --- the plan -----------------------------------------------------------------------------------------------


def make_plan(args: argparse.Namespace, prior: Prior) -> Plan:
    """Take from the prior what the command line left open, and refuse what contradicts it.

    Raises:
        InputError: with the flag, the prior's value and what to do.
    """
    check_flags(args, prior)
    model = args.model or prior.metadata.get("model", "I2V-480P")
    if model not in wan_models.MODEL_NAMES:
        raise InputError(f"the prior was made with the model {model!r}, which this version doesn't know")
    defaults = wan_models.model_defaults(model, args.model_dir)
    given = {name: value for name, value in vars(args).items() if value is not None}
    chosen = {**dataclasses.asdict(defaults), **prior.metadata, **given}
    method, start_step, steps_to_run = choose_steps(args, prior)
    return Plan(
        method=method,
        start_step=start_step,
        steps_to_run=steps_to_run,
        prompt=chosen["prompt"],
        negative_prompt=chosen["negative_prompt"],
        cfg_scale=chosen["cfg_scale"],
        fps=chosen["fps"],
        image=args.image,
        model=model,
        dtype=args.dtype or prior.metadata.get("dtype"),
    )


def check_flags(args: argparse.Namespace, prior: Prior) -> None:
    """Refuse flags that contradict the prior, and an older prior without what it doesn't record.

    Raises:
        InputError: with the flag, the prior's value and what to do.
    """
    for name in (*SCHEDULE_FLAGS, "model", "dtype"):
        given = getattr(args, name)
        if given is not None and given != prior.metadata.get(name, given):
            raise InputError(
                f"--{name} {given}: the prior has {prior.metadata[name]}; "
                "leave the flag out or make a prior with it"
            )
    for name in ("image", "prompt") if prior.is_legacy else ():
        if getattr(args, name) is None:
            raise InputError(f"{prior.directory} records no {name} (an older format): give --{name}")


def choose_steps(args: argparse.Namespace, prior: Prior) -> tuple[str, int | None, list[int]]:
    """Method, start_step and steps_to_run of a plan.

    Raises:
        InputError: a step the prior doesn't have, or a prior without what a differential resume needs.
    """
    differential = args.steps is not None or args.num_steps is not None
    if prior.is_legacy and differential:
        raise InputError(
            "--steps needs the prior's velocities, which this older format lacks; use --start_step"
        )
    if args.start_step is not None or prior.is_legacy:
        return "resume", *resumed_steps(args.start_step, prior)
    return "differential", None, differential_steps(args, prior)


def resumed_steps(start_step: int | None, prior: Prior) -> tuple[int, list[int]]:
    """start_step, by default the prior's recommendation, and the steps after it."""
    total = prior.num_inference_steps
    if start_step is None:
        start_step = prior.metadata.get("start_step", prior_utils.recommended_start_step(total))
    if start_step >= total:
        raise InputError(f"--start_step {start_step}: the prior has steps 0 to {total - 1}")
    return start_step, list(range(start_step + 1, total))


def differential_steps(args: argparse.Namespace, prior: Prior) -> list[int]:
    """The steps of a differential resume: those given, or so many spread over the schedule."""
    total = prior.num_inference_steps
    num_steps = args.num_steps or prior_utils.recommended_num_steps(total)
    if num_steps > total:
        raise InputError(f"--num_steps {num_steps}: the prior has only {total} steps")
    steps = args.steps or prior_utils.spread_steps(total, num_steps)
    if sorted(set(steps)) != steps or steps[-1] >= total:
        raise InputError(f"--steps {steps}: expected increasing steps between 0 and {total - 1}")
    return steps


def run_settings(plan: Plan, prior: Prior) -> RunSettings:
    """The prior's settings with the plan's guidance."""
    names = {field.name for field in dataclasses.fields(RunSettings)}
    recorded = {name: value for name, value in prior.metadata.items() if name in names}
    return RunSettings(**{**recorded, "cfg_scale": plan.cfg_scale})


def latents_files(plan: Plan, prior: Prior) -> list[str]:
    """The latents a plan starts from; for a differential resume those before each step, and the clean."""
    if plan.method == "resume":
        return [prior_utils.step_file(plan.start_step)]
    last = prior_utils.step_file(prior.num_inference_steps - 1)
    return [*map(prior_utils.latents_before_file, plan.steps_to_run), last]


def velocity_files(plan: Plan) -> list[str]:
    """The prior's velocities a plan needs: those of the steps of a differential resume."""
    return [] if plan.method == "resume" else list(map(prior_utils.noise_pred_file, plan.steps_to_run))


def conditioning_files(plan: Plan, prior: Prior) -> list[str]:
    """The prior's conditioning a plan needs; contexts of other prompts are not there."""
    if prior.is_legacy or not plan.steps_to_run:
        return []
    contexts = dict.fromkeys(map(prior_utils.context_file, plan.texts))
    return [*IDENTITY_FILES, *filter(prior.has, contexts)]


def needed_components(plan: Plan, prior: Prior) -> list[str]:
    """The parts of the model a plan needs: encoders only for what the prior doesn't hold already."""
    if not plan.steps_to_run:
        return ["vae"]
    components = ["dit", "vae"]
    if not all(prior.has(prior_utils.context_file(text)) for text in plan.texts):
        components.append("text_encoder")
    if prior.is_legacy:
        components.append("image_encoder")
    return components


# --- where the video goes -----------------------------------------------------------------------------------


def check_output(path: Path, prior: Prior, *, overwrite: bool) -> None:
    """Refuse an --output that no video can have; nothing is replaced unasked, the prior's own files never.

    Raises:
        InputError: with what is in the way.
    """
    if path.suffix != ".mp4":
        raise InputError(f"--output {path}: expected a name that ends in .mp4")
    report = path.with_suffix(".json")
    if len(report.name.encode()) > MAX_NAME_BYTES:
        raise InputError(
            f"--output: a name of {len(path.name.encode())} bytes is too long; use a shorter one"
        )
    own = {prior_utils.METADATA_FILE, prior_utils.OUTPUT_FILE, *prior.metadata.get("files", {})}
    inside = path.parent.exists() and path.parent.samefile(prior.directory)
    if inside and own & {path.name.lower(), report.name.lower()}:  # some file systems ignore case
        raise InputError(f"--output {path} would replace a file of the prior itself; choose another name")
    taken = [each for each in (path, report) if each.exists()]
    if taken and not overwrite:
        raise InputError(f"--output: {taken[0]} exists; choose another name or add --overwrite")
    if any(each.is_dir() for each in taken):
        raise InputError(f"--output: {taken[0]} is a folder; choose another name")


def free_output(plan: Plan, prior: Prior) -> Path:
    """A name in the prior's outputs folder that tells steps and prompt, and that nothing has yet."""
    if plan.method == "resume":
        start = f"step{plan.start_step:02d}"
    elif len(plan.steps_to_run) <= 6:
        start = "steps" + "-".join(map(str, plan.steps_to_run))
    else:
        start = f"{len(plan.steps_to_run)}steps"
    choices = json.dumps([plan.steps_to_run, plan.prompt, plan.negative_prompt, plan.cfg_scale])
    stem = f"{start}_{slug(plan.prompt)}_{hashlib.sha256(choices.encode()).hexdigest()[:8]}"
    path, again = prior.directory / "outputs" / f"{stem}.mp4", 1
    while path.exists() or path.with_suffix(".json").exists():
        again += 1
        path = path.with_name(f"{stem}_{again}.mp4")
    return path


def slug(prompt: str) -> str:
    """A prompt's words in any script, as a part of a file name of at most 60 bytes."""
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-")
    words = words.encode()[:60].decode(errors="ignore").strip("-")  # never half a character
    return words or ("prompt" if prompt else "no-prompt")


# --- checks before anything is loaded -----------------------------------------------------------------------


def read_inputs(plan: Plan, prior: Prior) -> Inputs:
    """Read and check everything a plan needs besides the model.

    Raises:
        InputError: something is missing, damaged, or not the prior's.
    """
    latents, velocities = latents_files(plan, prior), velocity_files(plan)
    conditioning = conditioning_files(plan, prior)
    digests = prior_utils.check_files(prior, [*latents, *velocities, *conditioning])
    inputs = Inputs(
        latents=[prior_utils.load_latents(prior, name) for name in latents],
        noise_pred=[prior_utils.load_latents(prior, name) for name in velocities],
        conditioning={name: prior_utils.load_conditioning(prior, name) for name in conditioning},
        image=read_image(plan.image, prior),
        prior_files=digests,
        image_sha256=None if plan.image is None else prior_utils.sha256_file(plan.image),
    )
    found = prior_utils.dtype_name(inputs.latents[0])
    if plan.dtype not in (None, found):
        raise InputError(f"--dtype {plan.dtype}: the prior's latents are {found}; leave the flag out")
    return inputs


def read_image(path: Path | None, prior: Prior) -> Image | None:
    """Read --image and compare it with the image the prior was made from, where the prior holds it.

    Raises:
        InputError: it can't be read, or is another.
    """
    if path is None:
        return None
    sizes = {"width": prior.metadata["width"], "height": prior.metadata["height"]}
    image = cli.read_image(path, **sizes)
    if not prior.is_legacy:
        prior_utils.check_files(prior, [prior_utils.IMAGE_FILE])
        own = prior.directory / prior_utils.IMAGE_FILE
        if image.tobytes() != cli.read_image(own, **sizes, label="the prior's image").tobytes():
            raise InputError(
                f"--image {path} is not the image the prior was made from ({own}); "
                "leave the flag out, or make a prior of this image"
            )
    return image


def check_schedule(prior: Prior) -> None:
    """Recompute the schedule with the installed scheduler and compare every value.

    Raises:
        InputError: they differ.
    """
    from wan_pipeline import compute_schedule

    timesteps, sigmas = compute_schedule(**{name: prior.metadata[name] for name in SCHEDULE_FLAGS})
    prior_utils.check_schedule(prior, timesteps=timesteps, sigmas=sigmas)


def check_fingerprint(prior: Prior, found: Mapping[str, str]) -> None:
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


def warn_of_old_motion(plan: Plan, prior: Prior) -> None:
    """Say so where a new prompt comes too late to be obeyed: motion is settled early."""
    if plan.method == "differential" or plan.prompt == prior.metadata.get("prompt"):
        return
    if plan.start_step >= LATE * prior.num_inference_steps and plan.steps_to_run:
        obeyed = OBEYED_AFTER_6[prior.metadata.get("prior_kind", "prompted")]
        advice = "make the prior again" if prior.is_legacy else "leave --start_step out"
        cli.warn(
            f"resuming after step {plan.start_step} of {prior.num_inference_steps} mostly keeps what the "
            f"prior shows: after 6 of 10, {obeyed} of the embedded model's clips obeyed a new prompt; "
            f"{advice} to have it obeyed in as many steps"
        )


def warn_of_doubts(plan: Plan, prior: Prior, *, device: str) -> None:
    """Say what could not be checked, or what differs from when the prior was made and may change bits."""
    if prior.is_legacy:
        cli.warn(
            f"{prior.directory} is of an older format, so these could not be checked: model ({plan.model} "
            "assumed), weights, image, prompts, cfg_scale, seed, checksums, versions, device"
        )
        return
    then = prior.metadata["versions"] | {"device_name": prior.metadata.get("device_name")}
    now = cli.versions() | cli.machine(device)
    names = ("torch", "diffsynth", "device_name")
    differ = [
        f"{name} {now[name]} (then {then.get(name)!r})" for name in names if now[name] != then.get(name)
    ]
    if differ:
        cli.warn(
            f"not as when the prior was made: {', '.join(differ)}; the result may differ in the last bits"
        )


# --- the run ------------------------------------------------------------------------------------------------


def complete_conditioning(
    plan: Plan, prior: Prior, *, inputs: Inputs, pipe: WanVideoPipeline
) -> Conditioning:
    """The prior's conditioning with the plan's prompts; only what the prior lacks is encoded."""
    from wan_pipeline import Conditioning, encode_image, encode_prompt

    if prior.is_legacy:
        identity = encode_image(pipe, inputs.image, num_frames=prior.metadata["num_frames"])
    else:
        identity = {Path(name).stem: inputs.conditioning[name] for name in IDENTITY_FILES}
    contexts = {}
    for text in plan.texts:
        recorded = inputs.conditioning.get(prior_utils.context_file(text))
        contexts[text] = encode_prompt(pipe, text) if recorded is None else recorded
    return Conditioning(
        **identity,
        context_posi=contexts[plan.prompt],
        context_nega=None if plan.cfg_scale == 1 else contexts[plan.negative_prompt],
    )


def run_steps(
    plan: Plan,
    prior: Prior,
    *,
    inputs: Inputs,
    pipe: WanVideoPipeline,
    conditioning: Conditioning | None,
) -> RunResult:
    """Run the plan's steps, one after the other or differentially."""
    from wan_pipeline import Trajectory, run_differential, run_from

    settings = run_settings(plan, prior)
    if plan.method == "resume":
        latents = inputs.latents[0]
        return run_from(
            pipe, settings, start_step=plan.start_step, latents=latents, conditioning=conditioning
        )
    trajectory = Trajectory(plan.steps_to_run, inputs.latents, inputs.noise_pred)
    return run_differential(pipe, settings, trajectory=trajectory, conditioning=conditioning)


def make_video(
    plan: Plan, prior: Prior, *, inputs: Inputs, pipe: WanVideoPipeline, path: Path, clock: Clock
) -> RunResult:
    """Encode what is new, run the steps, write the video."""
    from wan_pipeline import release

    conditioning = None
    if plan.steps_to_run:
        conditioning = complete_conditioning(plan, prior, inputs=inputs, pipe=pipe)
    release(pipe, ("text_encoder", "image_encoder"))
    clock.add("encode")
    result = run_steps(plan, prior, inputs=inputs, pipe=pipe, conditioning=conditioning)
    clock.include(result.seconds)
    path.parent.mkdir(parents=True, exist_ok=True)
    cli.write_video(result.frames, path, fps=plan.fps)
    clock.add("save")
    return result


def report(
    plan: Plan,
    prior: Prior,
    *,
    inputs: Inputs,
    options: LoadOptions,
    fingerprint: Mapping[str, str],
    result: RunResult,
    clock: Clock,
) -> dict[str, Any]:
    """Everything needed to make the video again, and what it cost."""
    return {
        "prior_dir": str(prior.directory.absolute()),
        "prior_run_id": prior.metadata["run_id"],
        "prior_files": inputs.prior_files,
        "image": None if plan.image is None else str(plan.image.absolute()),
        "image_sha256": inputs.image_sha256,
        "model": options.model,
        "model_dir": None if options.model_dir is None else str(options.model_dir.absolute()),
        "model_fingerprint": dict(fingerprint),
        "lora": prior.metadata.get("lora", []),
        "method": plan.method,
        "start_step": plan.start_step,
        "prompt": plan.prompt,
        "negative_prompt": plan.negative_prompt,
        **dataclasses.asdict(run_settings(plan, prior)),
        "fps": plan.fps,
        "dtype": options.dtype,
        "vram": options.vram,
        **cli.machine(options.device),
        "components_loaded": list(fingerprint),
        "steps_run": result.steps,
        "steps_skipped": prior.num_inference_steps - len(result.steps),
        "forwards": result.forwards,
        "seconds": clock.seconds,
        "seconds_per_step": result.seconds_per_step,
        "latents_sha256": prior_utils.sha256_tensor(result.latents),
        "versions": cli.versions(),
    }


def main(argv: list[str] | None = None) -> Path:
    """Make one video and return its path."""
    args = parse_args(argv)
    prior = prior_utils.read_prior(args.prior_dir)
    plan = make_plan(args, prior)
    if args.output is not None:
        check_output(args.output, prior, overwrite=args.overwrite)
    path = args.output or free_output(plan, prior)
    device = wan_models.pick_device(plan.model, args.device)
    warn_of_doubts(plan, prior, device=device)
    warn_of_old_motion(plan, prior)
    inputs = read_inputs(plan, prior)
    check_schedule(prior)
    cli.check_folder(path.parent, cli.video_bytes(run_settings(plan, prior)) + 2**20)
    total, running = prior.num_inference_steps, len(plan.steps_to_run)
    cli.say(
        f"runs {running} of {total} steps, skips {total - running}"
        if running
        else f"step {plan.start_step} is the last: nothing left to run, decodes only"
    )

    dtype = prior_utils.dtype_name(inputs.latents[0])
    options = LoadOptions(plan.model, device, dtype, args.vram, args.model_dir)
    options = dataclasses.replace(options, vram=wan_models.pick_vram(options))
    files = wan_models.weight_files(options, needed_components(plan, prior))
    fingerprint = wan_models.fingerprint(files)
    check_fingerprint(prior, fingerprint)
    clock = Clock()
    pipe = wan_models.load_pipeline(options, files)
    clock.add("load")
    result = make_video(plan, prior, inputs=inputs, pipe=pipe, path=path, clock=clock)
    data = report(
        plan, prior, inputs=inputs, options=options, fingerprint=fingerprint, result=result, clock=clock
    )
    prior_utils.write_json(path.with_suffix(".json"), data)
    cli.say(f"{path}: {result.forwards} forwards, {sum(clock.seconds.values()):.1f} s")
    return path


if __name__ == "__main__":
    cli.run_script(main)
