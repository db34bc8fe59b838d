"""Find or download the weight files of a model by its name, and compute their fingerprints.

The models of models/families.py are downloaded from ModelScope by DiffSynth's own ModelConfig; `tiny` is the
embedded model in data/tiny_wan_i2v: the same classes, small and trained, for the CPU.

`weight_files` and `tokenizer_folder` find the files, `fingerprint_files` identifies them; `LoadOptions` holds
the choice of a model and of how it is loaded.
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
# Folders of the embedded model: in the repository, or installed with the package.
TINY_DIRS = (ROOT / "data" / "tiny_wan_i2v", ROOT / "step_skip" / "tiny_wan_i2v")
TINY_DIR = next((path for path in TINY_DIRS if path.is_dir()), TINY_DIRS[0])
COMPONENTS = ("dit", "dit2", "vae", "text_encoder", "image_encoder")  # of all families, in loading order
EXPERTS = ("dit", "dit2")  # for high noise, for low noise
ENCODERS = ("text_encoder", "image_encoder")
SKIP_BRANCH = "skip_branch"  # optional component for --skip_cache (method/skip_cache.Branch)


@dataclass(frozen=True)
class LoadOptions:
    """A model, its source and its destination; the flags that both scripts share."""

    model: str
    device: str
    dtype: str
    vram: str = "auto"  # or a key of memory.HOMES
    model_dir: Path | None = None  # folder of the weights; None: DiffSynth's, or TINY_DIR
    loras: tuple[Lora, ...] = ()
    quantize: str | None = None  # a key of compute.QUANTIZATIONS
    compile: str | None = None  # a backend of torch.compile
    size: tuple[int, int, int] | None = None  # height, width, num_frames for estimates; None: the model's
    tiled: bool = True  # decoding in tiles, for estimates


def published_name(name: str) -> str:
    """Return the name under which a model was published, Wan2.1-I2V-14B-480P for example; tiny stays tiny."""
    return MODELS[name].model_id.split("/")[-1] if name in MODELS else name


def model_defaults(name: str, model_dir: Path | None = None) -> Defaults:
    """Return the defaults of a model; those of an embedded model are in its config.json."""
    if name != "tiny":  # a user's own pipeline has Wan's defaults
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
    """Return a model's family, a key of families.FAMILIES; an embedded model names it in its config.json.

    Raises:
        InputError: config.json names an unknown family.
    """
    if model in MODELS:
        return MODELS[model].family
    folder = model_dir or TINY_DIR
    name = read_tiny_config(folder).get("family", DEFAULT_FAMILY)
    if name not in FAMILIES:
        raise InputError(
            f"{folder / 'config.json'} has family = {name!r}, expected one of {', '.join(FAMILIES)}; fix it"
        )
    return name


def all_components(model: str, model_dir: Path | None = None) -> tuple[str, ...]:
    """Return all components of a model in the order of loading, and the skip_branch that it may have."""
    return (*FAMILIES[family_name(model, model_dir)].components, SKIP_BRANCH)


def read_tiny_config(folder: Path = TINY_DIR) -> dict[str, Any]:
    """Read an embedded model's config.json: sizes of its modules, length of the tokenizer, default settings.

    Raises:
        InputError: the folder has none, or it can't be read.
    """
    path = folder / "config.json"
    try:
        stat = path.stat()
        return dict(_config_of_version(path, stat.st_size, stat.st_mtime_ns))
    except (OSError, ValueError, TypeError) as error:
        raise _no_config(folder, error) from error


@functools.lru_cache(maxsize=8)
def _config_of_version(path: Path, size: int, mtime_ns: int) -> dict[str, Any]:
    """Read a config.json once for all plans of a sweep; size and date are part of the cache's key."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _no_config(folder: Path, error: Exception) -> InputError:
    return InputError(
        f"{folder} holds no config.json of an embedded model ({type(error).__name__}); "
        "name the folder that does with --model_dir"
    )


def cache_components(skip_cache: int | None) -> list[str]:
    """Return the additional components of a run with --skip_cache."""
    return [] if skip_cache is None else [SKIP_BRANCH]


# --- weight files -------------------------------------------------------------------------------------------


def weight_files(options: LoadOptions, components: Collection[str] | None = None) -> dict[str, list[Path]]:
    """Return the weight files of each component, after downloading the missing ones.

    A model without a skip_branch has an empty list for it.

    Args:
        components: components to find; None: all of the model.

    Raises:
        RunError: files could not be downloaded.
        InputError: --model_dir lacks files.
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
    """Return the file of an embedded model's skip_branch, if it exists; published models have none."""
    path = (options.model_dir or TINY_DIR) / f"{SKIP_BRANCH}.safetensors"
    return [path] if options.model not in MODELS and path.is_file() else []


def _fetch(model_id: str, pattern: str) -> list[Path]:
    """Find or download files with DiffSynth's ModelConfig and its environment variables."""
    from diffsynth.pipelines.wan_video import ModelConfig

    config = ModelConfig(model_id=model_id, origin_file_pattern=pattern)
    try:
        config.download_if_necessary()
    except Exception as error:  # modelscope, huggingface_hub, requests and urllib3 raise different errors
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
    """Return the files of a component in --model_dir, which may be flat or have ModelScope's layout."""
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
    """Check that no shard of a sharded file is missing."""
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
    """Return the tokenizer's folder, after downloading it if it is missing."""
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
    """Return a cheap fingerprint of each component's files, in hex, of names, sizes, headers and samples.

    It reads the header of a safetensors file and 33 pieces of 4 KiB spread evenly over the file, the first
    and the last included, so that 28 GB take milliseconds. A component without files has "none".
    """
    return {component: _fingerprint(paths) if paths else "none" for component, paths in files.items()}


def _fingerprint(paths: list[Path], *, pieces: int = 32, piece_bytes: int = 4096) -> str:
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                header_bytes = int.from_bytes(file.read(8), "little")  # the format begins with it
                digest.update(file.read(min(header_bytes, MAX_HEADER_BYTES)))
            for i in range(pieces + 1):
                file.seek(max(0, size - piece_bytes) * i // pieces)
                digest.update(file.read(piece_bytes))
    return digest.hexdigest()
