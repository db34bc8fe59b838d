"""The weights of a model by its name, before any is loaded: found or fetched, fingerprinted, LoRAs checked.

    those of families.py   fetched from ModelScope by DiffSynth's own ModelConfig
    tiny                   data/tiny_wan_i2v: the same classes, small and trained, for the CPU

    PATH[:ALPHA]      a LoRA; ALPHA is 1 unless given; the DiT's weights become W + ALPHA * lora_B @ lora_A

Checked against diffsynth 2.1.12, diffsynth/utils/lora/general.py: it takes keys that end in
`.lora_A.weight` / `.lora_B.weight` or `.lora_down.weight` / `.lora_up.weight`, with or without `.default`
and a leading `diffusion_model.`, and passes over layers that it doesn't find.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_skip.families import DEFAULT_FAMILY, FAMILIES, MODELS, TOKENIZER, Defaults
from step_skip.files import InputError, RunError, sha256_file

ROOT = Path(__file__).resolve().parents[1]
# the embedded model: in the repository, or installed with the package
TINY_PLACES = (ROOT / "data" / "tiny_wan_i2v", Path(__file__).with_name("tiny_wan_i2v"))
TINY_DIR = next((path for path in TINY_PLACES if path.is_dir()), TINY_PLACES[0])
COMPONENTS = ("dit", "dit2", "vae", "text_encoder", "image_encoder")  # of all families, as they are loaded
SKIP_BRANCH = "skip_branch"  # what --skip_cache uses besides, of a model that has it (cheaper.Branch)
MAX_HEADER_BYTES = 2**24  # of a safetensors file; the 14B model's headers are some 100 KB
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Lora:
    """A LoRA file and its strength."""

    path: Path
    alpha: float = 1.0


@dataclass(frozen=True)
class LoadOptions:
    """Which model, from where, onto what; the flags that both scripts share."""

    model: str
    device: str
    dtype: str
    vram: str = "auto"  # auto, plain or low
    model_dir: Path | None = None
    loras: tuple[Lora, ...] = ()


def published_name(name: str) -> str:
    """A model's name where it was published, Wan2.1-I2V-14B-480P for example; tiny has no other."""
    return MODELS[name].model_id.split("/")[-1] if name in MODELS else name


def model_defaults(name: str, model_dir: Path | None = None) -> Defaults:
    """The defaults of a model; an embedded one keeps its own in its config.json."""
    if name != "tiny":  # a pipeline of somebody's own has Wan's
        return MODELS[name].defaults if name in MODELS else Defaults()
    folder = model_dir or TINY_DIR
    try:
        own = dict(read_tiny_config(folder)["defaults"])
    except (KeyError, TypeError, ValueError) as error:
        raise _no_config(folder, error) from error
    known = {f.name for f in dataclasses.fields(Defaults)}
    return Defaults(**{"dtype": "float32", **{key: own[key] for key in own.keys() & known}})


def family_name(model: str, model_dir: Path | None = None) -> str:
    """The family of a model, in families.py; an embedded one may name another than I2V in its config.json.

    Raises:
        InputError: it names one that isn't there.
    """
    if model in MODELS:
        return MODELS[model].family
    folder = model_dir or TINY_DIR
    name = read_tiny_config(folder).get("family", DEFAULT_FAMILY)
    if name not in FAMILIES:
        raise InputError(
            f"{folder / 'config.json'} has family = {name!r}, expected one of {', '.join(FAMILIES)}"
        )
    return name


def all_components(model: str, model_dir: Path | None = None) -> tuple[str, ...]:
    """All parts of a model, in the order in which they are loaded, and the skip_branch it may have."""
    return (*FAMILIES[family_name(model, model_dir)].components, SKIP_BRANCH)


def read_tiny_config(folder: Path = TINY_DIR) -> dict[str, Any]:
    """The sizes of an embedded model's modules, the tokenizer's length and the command line's defaults.

    Raises:
        InputError: the folder holds none.
    """
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _no_config(folder, error) from error


def _no_config(folder: Path, error: Exception) -> InputError:
    return InputError(
        f"{folder} holds no config.json of an embedded model ({type(error).__name__}); "
        "name the folder that does with --model_dir"
    )


def cache_components(skip_cache: int | None) -> list[str]:
    """What a run with --skip_cache needs besides the four components."""
    return [] if skip_cache is None else [SKIP_BRANCH]


# --- where the weights are ----------------------------------------------------------------------------------


def weight_files(options: LoadOptions, components: Collection[str] | None = None) -> dict[str, list[Path]]:
    """The weight files of each component, fetched first where they are not there yet.

    A model without a skip_branch has no file of it, which is no error.

    Raises:
        RunError: they could not be fetched.
        InputError: --model_dir lacks some.
    """
    if components is None:
        components = all_components(options.model, options.model_dir)
    if "text_encoder" in components:
        tokenizer_folder(options)
    return {
        name: _skip_branch(options) if name == SKIP_BRANCH else _component_files(options, name)
        for name in components
    }


def _component_files(options: LoadOptions, name: str) -> list[Path]:
    if options.model not in MODELS:
        return _existing(options.model_dir or TINY_DIR, [f"{name}.safetensors"], name)
    if options.model_dir is not None:
        return _in_folder(options.model_dir, options.model, name)
    weights = MODELS[options.model].weights[name]
    return _fetch(weights.model_id, weights.pattern)


def _skip_branch(options: LoadOptions) -> list[Path]:
    """No branch was published for a real model."""
    path = (options.model_dir or TINY_DIR) / f"{SKIP_BRANCH}.safetensors"
    return [path] if options.model not in MODELS and path.is_file() else []


def _fetch(model_id: str, pattern: str) -> list[Path]:
    """Let DiffSynth's ModelConfig find or download the files, by its own environment variables."""
    from diffsynth.pipelines.wan_video import ModelConfig

    config = ModelConfig(model_id=model_id, origin_file_pattern=pattern)
    try:
        config.download_if_necessary()
    except Exception as error:  # modelscope, huggingface_hub, requests and urllib3 each raise their own
        raise RunError(
            f"cannot fetch {model_id}/{pattern} ({type(error).__name__}): connect to the network, name a "
            "folder of downloaded weights with --model_dir, or use --model tiny"
        ) from error
    paths = config.path if isinstance(config.path, list) else [config.path]
    if not paths:
        raise RunError(
            f"no {model_id}/{pattern} below {config.local_model_path} and downloading is off "
            "(DIFFSYNTH_SKIP_DOWNLOAD); unset it, or name a folder of downloaded weights with --model_dir"
        )
    return _complete_shards(sorted(Path(path) for path in paths))


def _in_folder(folder: Path, model: str, component: str) -> list[Path]:
    """The files of a component in --model_dir, laid out flat or as ModelScope lays them out."""
    weights, own_id = MODELS[model].weights[component], MODELS[model].model_id
    model_id, pattern = weights.model_id, weights.pattern
    original = pattern.replace(".safetensors", ".pth")
    candidates = [pattern, f"{model_id}/{pattern}", original, f"{own_id}/{original}", f"{own_id}/{pattern}"]
    return _complete_shards(_existing(folder, candidates, component))


def _existing(folder: Path, patterns: list[str], component: str) -> list[Path]:
    for pattern in patterns:
        paths = sorted(path for path in folder.glob(pattern) if path.exists())
        if paths:
            return paths
    raise InputError(
        f"{folder} holds no {patterns[0]} (the {component}); name the folder that does, with --model_dir"
    )


def _complete_shards(paths: list[Path]) -> list[Path]:
    """Refuse a sharded file of which some shards are missing."""
    match = re.fullmatch(r"(.*-)\d{5}-of-(\d{5})(\..*)", paths[0].name)
    if match is None:
        return paths
    names = [f"{match[1]}{i:05d}-of-{match[2]}{match[3]}" for i in range(1, int(match[2]) + 1)]
    missing = sorted(set(names) - {path.name for path in paths})
    if missing:
        raise InputError(
            f"{paths[0].parent} holds {len(names) - len(missing)} of the {len(names)} shards, "
            f"{missing[0]} is missing; finish the download"
        )
    return paths


def tokenizer_folder(options: LoadOptions) -> Path:
    """The tokenizer's folder, fetched first where it is not there yet."""
    model_id, folder = TOKENIZER
    if options.model not in MODELS:
        where, candidates = options.model_dir or TINY_DIR, ["tokenizer/"]
    elif options.model_dir is None:
        return _fetch(model_id, folder)[0]
    else:
        where = options.model_dir
        candidates = [folder, f"{model_id}/{folder}", f"{MODELS[options.model].model_id}/{folder}"]
    for candidate in candidates:
        if (where / candidate / "tokenizer.json").is_file():
            return where / candidate
    raise InputError(
        f"{where} holds no {candidates[0]}tokenizer.json (the tokenizer); "
        "name the folder that does, with --model_dir"
    )


def fingerprint_files(files: Mapping[str, list[Path]]) -> dict[str, str]:
    """A cheap fingerprint of each component's weights: names, sizes, headers and samples, in hex.

    Reads the header of a safetensors file and 33 pieces of 4 KiB spread evenly over the file, the first
    and the last among them, so 28 GB cost milliseconds.
    """
    return {component: _fingerprint(paths) if paths else "none" for component, paths in files.items()}


def _fingerprint(paths: list[Path], *, pieces: int = 32, piece_bytes: int = 4096) -> str:
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                header_bytes = int.from_bytes(file.read(8), "little")  # as the format begins
                digest.update(file.read(min(header_bytes, MAX_HEADER_BYTES)))
            for i in range(pieces + 1):
                file.seek(max(0, size - piece_bytes) * i // pieces)
                digest.update(file.read(piece_bytes))
    return digest.hexdigest()


# --- LoRAs --------------------------------------------------------------------------------------------------


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


def describe_loras(loras: Iterable[Lora]) -> list[dict[str, Any]]:
    """What a run's metadata says of its LoRAs.

    Raises:
        InputError: a file isn't there.
    """
    return [
        {"path": str(lora.path.absolute()), "alpha": lora.alpha, "sha256": _lora_sha256(lora.path)}
        for lora in loras
    ]


def parse_recorded_loras(described: object) -> tuple[Lora, ...]:
    """The LoRAs of what `describe_loras` made, as metadata has it.

    Raises:
        InputError: the metadata says something else.
    """
    return tuple(lora for lora, _ in _recorded_loras(described))


def _recorded_loras(described: object) -> list[tuple[Lora, str]]:
    """Each with the SHA-256 of its file; see `parse_recorded_loras`."""
    loras = []
    for each in described if isinstance(described, list) else [described]:
        match each:
            case {"path": str(path), "alpha": int() | float() as alpha, "sha256": str(sha256)}:
                loras.append((Lora(Path(path), alpha), sha256))
            case _:
                raise InputError(
                    f"run_metadata.json has {str(each)[:60]!r} as a LoRA, expected path, alpha and sha256; "
                    "make the prior again"
                )
    return loras


def summarize_loras(described: object) -> str:
    """What a person is told of the LoRAs that `describe_loras` described: the same for the same ones."""
    loras = _recorded_loras(described)
    told = [f"{lora.path.name}:{lora.alpha:g} ({sha256[:12]})" for lora, sha256 in loras]
    return ", ".join(told) or "no LoRA"


def find_recorded_loras(described: object) -> tuple[Lora, ...]:
    """The LoRAs that a prior's metadata describes; their files must still be there, and the same.

    Raises:
        InputError: they are not, or the metadata says something else.
    """
    loras = _recorded_loras(described)
    hint = "name it with --lora, or give --lora without a file to run without"
    for lora, sha256 in loras:
        if not lora.path.is_file():
            raise InputError(f"the prior was made with the LoRA {lora.path}, which is not there; {hint}")
        if _lora_sha256(lora.path) != sha256:
            raise InputError(f"the prior was made with another {lora.path} than is there now; {hint}")
    return tuple(lora for lora, _ in loras)


def _lora_sha256(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"--lora {path} is not a file; name a .safetensors file")
    stat = path.stat()
    return _sha256_of_version(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256_of_version(path: Path, size: int, mtime_ns: int) -> str:
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
    loras = list(loras)
    layers: dict[str, Sequence[int]] = {}
    for path in weights if loras else ():
        layers |= _layers(_read_shapes(path, what="the DiT's"))
    return [note for lora in loras if (note := _check_lora(lora, layers)) is not None]


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


def _check_lora(lora: Lora, layers: Shapes) -> str | None:
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
        _check_lora_shapes(lora, name, shapes[up], shapes[down], layers[name])
    unused = len(shapes) - sum(len({*pair, pairs[name][2]} - {None}) for name, pair in fitting.items())
    if unused:
        return (
            f"{lora.path}: {len(fitting)} layers take part, {unused} of {len(shapes)} tensors are not used "
            "(DiffSynth has no place for them)"
        )
    return None


def _check_lora_shapes(
    lora: Lora, name: str, up: Sequence[int], down: Sequence[int], layer: Sequence[int]
) -> None:
    """up: [out, rank], down: [rank, in], layer: [out, in]"""
    if len(up) != 2 or len(down) != 2 or up[1] != down[0] or [up[0], down[1]] != list(layer):
        raise InputError(
            f"--lora {lora.path} has {list(up)} and {list(down)} for {name}, which is {list(layer)} in this "
            "model; use a LoRA of this model"
        )
