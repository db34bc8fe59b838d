"""Parse LoRAs of a command line, record them in metadata and find them again, and detect distilled ones.

    PATH[:ALPHA]      a LoRA; ALPHA is its strength, 1 by default; a sweep takes several, 0.5,1
    high=PATH[:ALPHA], low=PATH[:ALPHA]   a LoRA for one of two experts; without the word it is for both

models/lora_file.py reads and applies the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from step_skip.errors import InputError
from step_skip.files.bounds import MAX_LORA_BYTES
from step_skip.files.reading import remembered_sha256
from step_skip.files.tensors import read_header
from step_skip.models.lora_file import DIFFERENCES, Lora, kind_of, peft_config, read_lora

EXPERT_WORDS = {"high": "dit", "low": "dit2"}
DISTILLED = re.compile(r"lightx2v|lightning|distil", re.IGNORECASE)
STEPS = re.compile(r"(?<!\d)([1-9]|1\d)[ _-]?steps?", re.IGNORECASE)
DISTILLED_SHIFT = 5.0
# Metadata keys in which tools put a name: kohya's trainer, the Stability AI model metadata standard, others.
TITLES = ("ss_output_name", "modelspec.title", "modelspec.description", "name", "description")


def parse_lora(text: str) -> Lora:
    """Parse PATH or PATH:ALPHA, with high= or low= before it for one of two experts.

    Raises:
        ValueError: ALPHA is not a number other than 0, or there are several.
    """
    lora, *more = parse_strengths(text)
    if more:
        raise ValueError(f"{text} has several strengths, which only infer_from_prior.py takes; give one")
    return lora


def parse_strengths(text: str) -> list[Lora]:
    """Parse the text of one LoRA (see `parse_lora`) with one or more strengths, PATH:ALPHA,ALPHA.

    Raises:
        ValueError: ALPHA is not a number other than 0.
    """
    word, equals, rest = text.partition("=")
    expert = EXPERT_WORDS.get(word) if equals else None
    text = text if expert is None else rest
    path, colon, tail = text.rpartition(":")
    alphas: list[float] = []
    with contextlib.suppress(ValueError):
        alphas = [float(each) for each in tail.split(",")]
    if not colon or not alphas:
        return [Lora(Path(text), expert=expert)]
    for alpha in alphas:
        if not math.isfinite(alpha) or alpha == 0:
            raise ValueError(f"alpha {alpha:g} is not a number other than 0")
    return [Lora(Path(path), alpha, expert) for alpha in alphas]


def check_lora_experts(loras: Iterable[Lora], *, experts: int) -> None:
    """Check that no LoRA names an expert if the model has a single network.

    Raises:
        InputError: a LoRA names one.
    """
    for lora in loras:
        if lora.expert is not None and experts == 1:
            raise InputError(
                f"--lora {_word(lora)}{lora.path}: this model has one network; name the file alone"
            )


def _word(lora: Lora) -> str:
    """Return the word before a LoRA's path: "high=", "low=" or ""."""
    return "".join(f"{word}=" for word, expert in EXPERT_WORDS.items() if expert == lora.expert)


def lora_text(lora: Lora) -> str:
    """Return the text of a LoRA that `parse_lora` parses."""
    return f"{_word(lora)}{lora.path}:{lora.alpha:g}"


def check_loras(loras: Iterable[Lora], weights: Iterable[Path]) -> list[str]:
    """Check that LoRAs fit a DiT's parameters and that their values are finite.

    Args:
        weights: the DiT's .safetensors files, of which only the headers are read.

    Returns:
        Warnings about the LoRAs, a line each.

    Raises:
        InputError: a file can't be read, or a part of it can't be applied.
    """
    loras = list(loras)
    parameters: dict[str, Sequence[int]] = {}
    for path in weights if loras else ():
        parameters |= read_header(path, what="the DiT's").shapes
    files = [read_lora(lora, parameters) for lora in loras]
    for file in files:
        file.check_values()
    return [file.note for file in files if file.note is not None]


# --- distilled LoRAs ----------------------------------------------------------------------------------------


def distilled_steps(lora: Lora) -> int | None:
    """Return the number of steps that a LoRA was distilled for, by its name or metadata; None: not distilled.

    The default is 4, as LightX2V's LoRAs are made for 4 steps without guidance (its configs/distill/wan21).

    Raises:
        InputError: the file doesn't exist or can't be read.
    """
    metadata = read_header(lora.path, what="--lora").metadata
    names = " ".join([lora.path.name, *(metadata.get(name, "")[:200] for name in TITLES)])
    if DISTILLED.search(names) is None:
        return None
    steps = STEPS.search(names)
    return 4 if steps is None else int(steps[1])


def distilled_hint(loras: Iterable[Lora]) -> str | None:
    """Return a hint with the flags of generate_prior.py for a distilled LoRA; None if no LoRA is distilled.

    Raises:
        InputError: see `distilled_steps`.
    """
    for lora in loras:
        if steps := distilled_steps(lora):
            flags = f"--cfg_scale 1 --num_inference_steps {steps} --sigma_shift {DISTILLED_SHIFT:g}"
            return (
                f"hint: {lora.path.name} appears to be distilled for {steps} steps without guidance; "
                f"make its prior with {flags}"
            )
    return None


# --- LoRAs in metadata --------------------------------------------------------------------------------------


def describe_loras(loras: Iterable[Lora]) -> list[dict[str, Any]]:
    """Return the metadata of a run's LoRAs; `differences` is the number of tensors that belong to no pair.

    Raises:
        InputError: a file doesn't exist or can't be read.
    """
    described = []
    for lora in loras:
        entry = {"path": str(lora.path.absolute()), "alpha": lora.alpha, "sha256": _lora_sha256(lora.path)}
        entry |= {} if lora.expert is None else {"expert": lora.expert}
        keys = read_header(lora.path, what="--lora").shapes
        differences = sum(kind_of(key)[0] in DIFFERENCES for key in keys)
        described.append(entry | ({"differences": differences} if differences else {}))
    return described


def parse_recorded_loras(described: object) -> tuple[Lora, ...]:
    """Return the LoRAs that `describe_loras` recorded, without opening their files.

    Args:
        described: the entry of the metadata.

    Raises:
        InputError: the entry is not of the form that `describe_loras` writes.
    """
    return tuple(lora for lora, _, _ in _recorded_loras(described))


def _recorded_loras(described: object) -> list[tuple[Lora, str, bool]]:
    """Return each LoRA, its file's SHA-256 and whether it has differences; see `parse_recorded_loras`."""
    loras = []
    for each in described if isinstance(described, list) else [described]:
        match each:
            case {"path": str(path), "alpha": int() | float() as alpha, "sha256": str(sha256), **more}:
                expert = str(more["expert"]) if "expert" in more else None
                loras.append((Lora(Path(path), alpha, expert), sha256, "differences" in more))
            case _:
                raise InputError(
                    f"run_metadata.json has {str(each)[:60]!r} as a LoRA, expected path, alpha and sha256; "
                    "make the prior again"
                )
    return loras


def summarize_loras(described: object) -> str:
    """Return a text about the LoRAs that `describe_loras` recorded; equal LoRAs give equal texts."""
    texts = []
    for lora, sha256, differences in _recorded_loras(described):
        more = " with its differences" if differences else ""
        texts.append(f"{_word(lora)}{lora.path.name}:{lora.alpha:g} ({sha256[:12]}){more}")
    return ", ".join(texts) or "no LoRA"


def find_recorded_loras(described: object) -> tuple[Lora, ...]:
    """Return the LoRAs that a prior's metadata records, after a check that their files are unchanged.

    A prior may come from an untrusted source and name any path. So this is called only when a model is to be
    loaded, and opens only regular .safetensors files of a LoRA's size.

    Raises:
        InputError: a file is missing or has changed, or the metadata has another form.
    """
    loras = _recorded_loras(described)
    hint = "name it with --lora, or give --lora without a file to run without"
    for lora, sha256, _ in loras:
        if not (lora.path.is_absolute() and lora.path.suffix == ".safetensors"):
            raise InputError(
                f"the prior records {lora.path} as a LoRA, expected an absolute path of a .safetensors file; "
                f"{hint}"
            )
        if not lora.path.is_file():
            raise InputError(
                f"the prior was made with the LoRA {lora.path}, and there is no such file; {hint}"
            )
        if _lora_sha256(lora.path) != sha256:
            raise InputError(f"the prior was made with another {lora.path} than is there now; {hint}")
    return tuple(lora for lora, _, _ in loras)


def _lora_sha256(path: Path) -> str:
    """Return the SHA-256 of a LoRA file, together with PEFT's file of its alpha if there is one."""
    if not path.is_file():
        raise InputError(f"--lora {path} is not a file; name a .safetensors file")
    config = peft_config(path)
    digests = [remembered_sha256(each, most=MAX_LORA_BYTES) for each in (path, config) if each is not None]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
