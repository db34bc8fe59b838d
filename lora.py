"""LoRAs: named on the command line, checked before any weight is loaded, put in by DiffSynth's own loader.

    --lora PATH[:ALPHA]      ALPHA is 1 unless given; the DiT's weights become W + ALPHA * lora_B @ lora_A

Checked against diffsynth 2.1.12, diffsynth/utils/lora/general.py: it takes keys that end in
`.lora_A.weight` / `.lora_B.weight` or `.lora_down.weight` / `.lora_up.weight`, with or without `.default`
and a leading `diffusion_model.`, and passes over layers that it doesn't find.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prior_utils import InputError, sha256_file

if TYPE_CHECKING:
    from diffsynth.pipelines.wan_video import WanVideoPipeline

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Lora:
    """A LoRA file and its strength."""

    path: Path
    alpha: float = 1.0


def parse_lora(text: str) -> Lora:
    """PATH or PATH:ALPHA.

    Raises:
        ValueError: ALPHA is no strength.
    """
    path, colon, tail = text.rpartition(":")
    alpha = None
    with contextlib.suppress(ValueError):
        alpha = float(tail)
    if not colon or alpha is None:
        return Lora(Path(text))
    if not math.isfinite(alpha) or alpha == 0:
        raise ValueError(f"alpha {tail} is not a number other than 0")
    return Lora(Path(path), alpha)


def describe(loras: Iterable[Lora]) -> list[dict[str, Any]]:
    """What a run's metadata says of its LoRAs.

    Raises:
        InputError: a file isn't there.
    """
    return [
        {"path": str(lora.path.absolute()), "alpha": lora.alpha, "sha256": _sha256(lora.path)}
        for lora in loras
    ]


def of(described: object) -> tuple[Lora, ...]:
    """The LoRAs of what `describe` made, as metadata has it.

    Raises:
        InputError: the metadata says something else.
    """
    loras = []
    for each in described if isinstance(described, list) else [described]:
        match each:
            case {"path": str(path), "alpha": int() | float() as alpha, "sha256": str()}:
                loras.append(Lora(Path(path), alpha))
            case _:
                raise InputError(
                    f"run_metadata.json has {str(each)[:60]!r} as a LoRA, expected path, alpha and sha256; "
                    "make the prior again"
                )
    return tuple(loras)


def summary(described: object) -> str:
    """What a person is told of the LoRAs that `describe` described: the same for the same ones."""
    names = [f"{lora.path.name}:{lora.alpha:g}" for lora in of(described)]
    digests = [each["sha256"][:12] for each in described]
    return ", ".join(f"{name} ({digest})" for name, digest in zip(names, digests, strict=True)) or "no LoRA"


def recorded(described: object) -> tuple[Lora, ...]:
    """The LoRAs that a prior's metadata describes; their files must still be there, and the same.

    Raises:
        InputError: they are not, or the metadata says something else.
    """
    loras = of(described)
    hint = "name it with --lora, or give --lora without a file to run without"
    for lora, each in zip(loras, described, strict=True):
        if not lora.path.is_file():
            raise InputError(f"the prior was made with the LoRA {lora.path}, which is not there; {hint}")
        if _sha256(lora.path) != each["sha256"]:
            raise InputError(f"the prior was made with another {lora.path} than is there now; {hint}")
    return loras


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"--lora {path} is not a file; name a .safetensors file")
    stat = path.stat()
    return _sha256_of(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256_of(path: Path, size: int, mtime_ns: int) -> str:
    """Once for all videos of a sweep: a LoRA of a 14B model has hundreds of MB."""
    return sha256_file(path)


def check_loras(loras: Iterable[Lora], weights: Iterable[Path]) -> list[str]:
    """Compare LoRAs with the layers they are for, by the files' headers alone.

    Args:
        weights: the DiT's .safetensors files.

    Returns:
        A line on each LoRA of which something is not used.

    Raises:
        InputError: no safetensors file, no LoRA in it, no layer that it fits, or another shape.
    """
    loras, layers = list(loras), {}
    for path in weights if loras else ():
        layers |= _layers(_read_shapes(path, what="the DiT's"))
    return [note for lora in loras if (note := _check(lora, layers)) is not None]


def _layers(shapes: Shapes) -> dict[str, Sequence[int]]:
    return {
        key.removesuffix(".weight"): shape
        for key, shape in shapes.items()
        if key.endswith(".weight") and len(shape) == 2
    }


def _read_shapes(path: Path, *, what: str) -> dict[str, Sequence[int]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{what} {path} is not a file; name a .safetensors file")
    try:
        with safe_open(path, framework="numpy") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{what} {path} is not a safetensors file that can be read ({str(error)[:80]}); "
            "fetch it again, or convert it"
        ) from error


def _check(lora: Lora, layers: Shapes) -> str | None:
    """The line on what isn't used of a LoRA, or None."""
    from diffsynth.utils.lora.general import GeneralLoRALoader

    shapes = _read_shapes(lora.path, what="--lora")
    try:
        pairs = GeneralLoRALoader().get_name_dict(shapes)
    except ValueError:  # its search for lora_B among the words of a key
        pairs = {}
    whole = {name: (up, down) for name, (up, down, _) in pairs.items() if down in shapes}
    if not whole:
        raise InputError(
            f"--lora {lora.path} holds {len(shapes)} tensors and no lora_A and lora_B (or lora_down and "
            "lora_up) of one layer; name a LoRA"
        )
    fitting = {name: pair for name, pair in whole.items() if name in layers}
    if not fitting:
        raise InputError(
            f"--lora {lora.path} matches no layer of this model: it has {next(iter(whole))!r}, the model "
            f"{next(iter(layers), 'none')!r}; use a LoRA of this model in DiffSynth's naming"
        )
    for name, (up, down) in fitting.items():
        _check_shapes(lora, name, shapes[up], shapes[down], layers[name])
    unused = len(shapes) - sum(len({*pair} | _alphas(pairs[name])) for name, pair in fitting.items())
    if unused:
        return (
            f"{lora.path}: {len(fitting)} layers take part, {unused} of {len(shapes)} tensors are not used "
            "(DiffSynth has no place for them)"
        )
    return None


def _alphas(names: tuple[str, str, str | None]) -> set[str]:
    return set() if names[2] is None else {names[2]}


def _check_shapes(
    lora: Lora, name: str, up: Sequence[int], down: Sequence[int], layer: Sequence[int]
) -> None:
    """up: [out, rank], down: [rank, in], layer: [out, in]"""
    if len(up) != 2 or len(down) != 2 or up[1] != down[0] or [up[0], down[1]] != list(layer):
        raise InputError(
            f"--lora {lora.path} has {list(up)} and {list(down)} for {name}, which is {list(layer)} in this "
            "model; use a LoRA of this model"
        )


def load_loras(pipe: WanVideoPipeline, loras: Iterable[Lora]) -> None:
    """Put LoRAs into the pipeline's DiT, one after the other."""
    for lora in loras:
        pipe.load_lora(pipe.dit, str(lora.path), alpha=lora.alpha)
