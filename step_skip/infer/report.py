"""The JSON beside a clip: written, read, and turned back into a command line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from step_skip.errors import InputError
from step_skip.files.bounds import MAX_EMBEDDED_BYTES, MAX_REPORT_BYTES
from step_skip.files.reading import opened, remembered_sha256
from step_skip.files.tensors import sha256_tensor
from step_skip.infer.inputs import Source
from step_skip.infer.plan import Plan, describe_choices, input_files, settings_of
from step_skip.infer.schema import TO_REPEAT, ClipReport, parse_entries, parse_report, read_report_entries
from step_skip.media.decoding import running_ffmpeg
from step_skip.models.compute import OFF
from step_skip.models.loading import Model
from step_skip.models.lora import lora_entries, lora_text, loras_of
from step_skip.models.machine import describe_machine, installed_versions
from step_skip.models.memory import peak_memory
from step_skip.models.weights import COMPONENTS, model_defaults
from step_skip.pipeline.results import RunResult
from step_skip.prior.files import recorded_sha256
from step_skip.prior.prior import Prior, choose_guidance, experts_of, number_of_steps

if TYPE_CHECKING:
    from PIL.Image import Image


def describe_clip(source: Source, plan: Plan, model: Model, result: RunResult) -> dict[str, Any]:
    """Return everything needed to make the clip again, and what it cost."""
    look, options = result.first_look, model.options
    prior = source.members[look.nearest if look else 0].prior
    report = {
        "prior_dir": str(prior.directory.absolute()),
        "prior_prompt": prior.metadata.prompt,
        "prior_image": prior.image_name,
        **describe_settings(source, plan),
        "prior_run_id": prior.metadata.run_id,
        **(look.describe() if look else {}),
        "auto": None if plan.auto is None else dataclasses.asdict(plan.auto),
        "image": str(plan.image.absolute()) if isinstance(plan.image, Path) else None,
        "model_dir": None if options.model_dir is None else str(options.model_dir.absolute()),
        "model_fingerprint": dict(model.fingerprint),
        "prior_lora": lora_entries(prior.metadata.lora),
        "dtype": options.dtype,
        "vram": options.vram,
        "peak_memory": peak_memory(options.device),
        **describe_machine(options.device),
        "components_loaded": [name for name in COMPONENTS if name in model.fingerprint],
        "prior_steps": min(number_of_steps(member.prior) for member in source.members),
        "steps_run": result.steps,
        "steps_skipped": prior.num_inference_steps - len(result.steps),
        "forwards": result.forwards,
        "block_evaluations": result.block_evaluations,
        "seconds_per_step": result.seconds_per_step,
        "latents_sha256": sha256_tensor(result.latents),
        "versions": installed_versions(),
    }
    as_read = parse_report(json.loads(json.dumps(report)), "the clip", required=TO_REPEAT)
    return report | {"command": command_of(as_read, prior)}


def describe_settings(source: Source, plan: Plan) -> dict[str, Any]:
    """Return the entries of a clip's JSON that decide the clip."""
    settings = dict(vars(settings_of(plan, source.prior)))
    if settings["switch_DiT_boundary"] is None:  # one network: as it was before there were two
        del settings["switch_DiT_boundary"]
    own = {} if source.others else {"prior_run_id": source.prior.metadata.run_id}
    return {
        **own,
        "prior_files": describe_files(source, plan),
        "image_sha256": None if plan.image is None else sha256_image(plan.image),
        **settings,
        **describe_choices(plan),
    }


def describe_files(source: Source, plan: Plan) -> dict[str, str | None]:
    """Return the SHA-256 of every file of the prior that a plan needs; of a bank's by run id and name."""
    return {
        f"{member.prior.metadata.run_id}/{name}" if source.others else name: recorded_sha256(
            member.prior, name
        )
        or member.inputs.prior_files.get(name)
        for member in source.members
        for name in input_files(plan, member.prior)
    }


def sha256_image(image: Path | Image) -> str:
    """Return the SHA-256 of an image's file, or of its pixels if it has none, in hex."""
    if not isinstance(image, Path):
        return hashlib.sha256(image.tobytes()).hexdigest()
    return remembered_sha256(image)


# the flag that chooses the steps of each method
STEP_FLAGS: Final = {"resume": "start_step", "differential": "steps", "sigmas": "sigmas"}
# The entries of an .mp4's own metadata: all that decides the clip, nothing of the machine or of its time.
EMBEDDED = (
    "prompt",
    "negative_prompt",
    "seed",
    "model",
    "prior_run_id",
    "prior_prompt",
    "prior_image",
    "num_inference_steps",
    "method",
    "start_step",
    "steps_run",
    "sigmas",
    "forwards",
    "cfg_scale",
    "sigma_shift",
    "height",
    "width",
    "num_frames",
    "fps",
    "lora",
    "skip_cache",
    "tea_cache_l1_thresh",
    "tea_cache_model_id",
    "command",
)


def flags_of(report: ClipReport, prior: Prior) -> dict[str, Any]:
    """Return by flag what a clip was asked for beyond what its prior gives; its steps as they ran."""
    m, defaults = prior.metadata, model_defaults(report.model)
    flag = STEP_FLAGS[report.method or "differential"]
    flags = {"prompt": report.prompt, flag: report.steps_run if flag == "steps" else getattr(report, flag)}
    experts = experts_of(report.steps_run, report.sigmas, prior)
    usual = choose_guidance(
        prior, cfg_scale=None, cfg_scale_2=None, default=defaults.cfg_scale, experts=experts
    )
    for name, default in (
        ("negative_prompt", m.negative_prompt),
        ("cfg_scale", list(usual) if isinstance(usual, tuple) else usual),
        ("fps", defaults.fps if m.fps is None else m.fps),
        ("skip_cache", None),
        ("tea_cache_l1_thresh", None),
        ("tea_cache_model_id", ""),
        ("model_dir", None),
    ):
        if (given := getattr(report, name)) not in (None, default):
            flags[name] = given
    if report.tiled != m.tiled:
        flags["vae_tiling"] = "on" if report.tiled else "off"
    for name in ("quantize", "compile"):
        if (given := getattr(report, name)) != getattr(m, name):
            flags[name] = given or OFF
    if prior.is_legacy:
        flags |= {"image": report.image, "model": report.model}
    if [each.identity for each in report.lora] != [each.identity for each in m.lora]:
        flags["lora"] = [lora_text(lora) for lora in loras_of(report.lora)]
    return flags


# every flag of the command lines that `command_of` writes
COMMAND_FLAGS: Final = frozenset(
    f"--{name}"
    for name in (
        *("prior_dir", "prompt", *STEP_FLAGS.values(), "negative_prompt", "cfg_scale", "fps", "skip_cache"),
        *("tea_cache_l1_thresh", "tea_cache_model_id", "model_dir", "vae_tiling", "quantize", "compile"),
        *("image", "model", "lora"),
    )
)


FILE_FLAGS: Final = frozenset(("--prior_dir", "--image", "--lora"))


def command_of(report: ClipReport, prior: Prior) -> str:
    """Return the command line that makes a clip again, quoted for a shell."""
    words = ["python", "infer_from_prior.py", "--prior_dir", str(prior.directory)]
    for name, value in flags_of(report, prior).items():
        values = [str(each) for each in value] if isinstance(value, list) else [str(value)]
        if len(values) == 1 and values[0].startswith("-"):
            words.append(f"--{name}={values[0]}")
        else:
            words += [f"--{name}", *values]
    return shlex.join(words)


def video_tags(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of a clip's .mp4 by MP4's names, without the prior's path or too long entries."""
    recorded = {name: report[name] for name in EMBEDDED if report.get(name) is not None}
    recorded["command"] = shlex.join(without_folders(shlex.split(report["command"])))
    if "lora" in recorded:
        recorded["lora"] = [each | {"path": Path(each["path"]).name} for each in recorded["lora"]]
    tags = {
        "title": report["prompt"][:200],
        "description": recorded["command"],
        "comment": json.dumps(recorded, ensure_ascii=False),
    }
    plain = {name: text.replace("\0", "").encode(errors="replace") for name, text in tags.items()}
    return {name: text.decode() for name, text in plain.items() if len(text) <= MAX_EMBEDDED_BYTES}


def without_folders(words: Iterable[str]) -> Iterator[str]:
    """Yield the words of a command line without --model_dir, and with the names of files for their paths."""
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            if flag != "--model_dir":
                yield f"{flag}={Path(value).name}" if equals and flag in FILE_FLAGS else word
        elif flag in FILE_FLAGS:
            is_of_expert = word.startswith(("high=", "low="))
            expert, equals, path = word.partition("=") if is_of_expert else ("", "", word)
            yield f"{expert}{equals}{Path(path).name}"
        elif flag != "--model_dir":
            yield word


def read_clip(path: Path) -> ClipReport:
    """Read what is recorded beside a clip or, for an .mp4 without a .json, in the .mp4 itself.

    Raises:
        InputError: neither is there, or it can't make the clip again.
    """
    beside = path.with_suffix(".json")
    try:
        if path.suffix == ".mp4" and not beside.is_file():
            entries = parse_entries(read_comment(path).encode(errors="replace"), path.name)
        else:
            entries = read_report_entries(beside)
        return parse_report(entries, path.name, required=TO_REPEAT)
    except InputError as error:
        raise InputError(f"--like {path}: {error}; name a clip's .json or .mp4") from error


def read_comment(path: Path) -> str:
    """Read the comment in an .mp4's own metadata; "" if there is none.

    Raises:
        InputError: no such file.
    """
    if not path.is_file():
        raise InputError(f"--like {path} is not a file; name a clip's .json or .mp4")
    try:
        with opened(path, follow=True) as file, running_ffmpeg(file, "mov", ["-f", "ffmetadata"]) as output:
            found = output.read(MAX_REPORT_BYTES)
    except InputError as error:
        raise InputError(f"--like {path} cannot be read ({error}); name a clip's .json or .mp4") from error
    comment = re.search(rb"^comment=((?:[^\\\n]|\\.)*)", found, flags=re.MULTILINE | re.DOTALL)
    return (
        ""
        if comment is None
        else re.sub(rb"\\(.)", rb"\1", comment[1], flags=re.DOTALL).decode("utf-8", "replace")
    )
