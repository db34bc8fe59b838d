"""The weights of a model by its name, before any is loaded: found or fetched, fingerprinted.

those of families.py   fetched from ModelScope by DiffSynth's own ModelConfig
tiny                   data/tiny_wan_i2v: the same classes, small and trained, for the CPU
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_skip.errors import InputError, RunError
from step_skip.files.bounds import MAX_HEADER_BYTES
from step_skip.models.families import DEFAULT_FAMILY, FAMILIES, MODELS, TOKENIZER, Defaults
from step_skip.models.lora_file import Lora

ROOT = Path(__file__).resolve().parents[2]
# the embedded model: in the repository, or installed with the package
TINY_PLACES = (ROOT / "data" / "tiny_wan_i2v", ROOT / "step_skip" / "tiny_wan_i2v")
TINY_DIR = next((path for path in TINY_PLACES if path.is_dir()), TINY_PLACES[0])
COMPONENTS = ("dit", "dit2", "vae", "text_encoder", "image_encoder")  # of all families, as they are loaded
EXPERTS = ("dit", "dit2")  # for high noise, for low noise
ENCODERS = ("text_encoder", "image_encoder")
SKIP_BRANCH = "skip_branch"  # what --skip_cache uses besides, of a model that has it (cheaper.Branch)


@dataclass(frozen=True)
class LoadOptions:
    """Which model, from where, onto what; the flags that both scripts share."""

    model: str
    device: str
    dtype: str
    vram: str = "auto"  # or one of memory.HOMES
    model_dir: Path | None = None
    loras: tuple[Lora, ...] = ()
    quantize: str | None = None  # one of compute.METHODS
    compile: str | None = None  # a backend of torch.compile
    size: tuple[int, int, int] | None = None  # height, width, num_frames; None: the model's; for estimates
    tiled: bool = True  # for estimates


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
    usual = {"dtype": "float32", "any_size": False}
    return Defaults(**{**usual, **{key: own[key] for key in own.keys() & known}})


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
    path = folder / "config.json"
    try:
        stat = path.stat()
        return dict(_config_of_version(path, stat.st_size, stat.st_mtime_ns))
    except (OSError, ValueError, TypeError) as error:
        raise _no_config(folder, error) from error


@functools.lru_cache(maxsize=8)
def _config_of_version(path: Path, size: int, mtime_ns: int) -> dict[str, Any]:
    """Once for all plans of a sweep."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


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
