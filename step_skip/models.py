"""The models by name, and their weights before any is loaded: found or fetched, fingerprinted.

I2V-480P, I2V-720P   Wan2.1-I2V-14B, fetched from ModelScope by DiffSynth's own ModelConfig
tiny                 data/tiny_wan_i2v: the same classes, small and trained, for the CPU
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_skip.files import MAX_HEADER_BYTES, InputError, RunError
from step_skip.lora_file import Lora

ROOT = Path(__file__).resolve().parents[1]
# the embedded model: in the repository, or installed with the package
TINY_PLACES = (ROOT / "data" / "tiny_wan_i2v", Path(__file__).with_name("tiny_wan_i2v"))
TINY_DIR = next((path for path in TINY_PLACES if path.is_dir()), TINY_PLACES[0])
COMPONENTS = ("dit", "vae", "text_encoder", "image_encoder")
SKIP_BRANCH = "skip_branch"  # what --skip_cache uses besides, of a model that has it (cheaper.Branch)
ALL_COMPONENTS = (*COMPONENTS, SKIP_BRANCH)
CONVERTED = "DiffSynth-Studio/Wan-Series-Converted-Safetensors"  # where DiffSynth redirects the .pth files
SHARED_FILES = {
    "vae": (CONVERTED, "Wan2.1_VAE.safetensors"),
    "text_encoder": (CONVERTED, "models_t5_umt5-xxl-enc-bf16.safetensors"),
    "image_encoder": (CONVERTED, "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors"),
}
TOKENIZER = ("Wan-AI/Wan2.1-T2V-1.3B", "google/umt5-xxl/")
# Wan's usual negative prompt, from the examples of Wan2.1 and DiffSynth-Studio.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class Defaults:
    """What a model runs with unless told otherwise; the names are WanVideoPipeline's."""

    height: int = 480
    width: int = 832
    num_frames: int = 81
    fps: float = 16
    cfg_scale: float = 5.0
    sigma_shift: float = 5.0
    negative_prompt: str = WAN_NEGATIVE_PROMPT
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class LoadOptions:
    """Which model, from where, onto what; the flags that both scripts share."""

    model: str
    device: str
    dtype: str
    vram: str = "auto"  # auto, plain or low
    model_dir: Path | None = None
    loras: tuple[Lora, ...] = ()


REAL_MODELS = {
    "I2V-480P": ("Wan-AI/Wan2.1-I2V-14B-480P", Defaults()),
    "I2V-720P": ("Wan-AI/Wan2.1-I2V-14B-720P", Defaults(height=720, width=1280)),
}
MODEL_NAMES = (*REAL_MODELS, "tiny")


def published_name(name: str) -> str:
    """A model's name where it was published, Wan2.1-I2V-14B-480P for example; tiny has no other."""
    return REAL_MODELS[name][0].split("/")[-1] if name in REAL_MODELS else name


def model_defaults(name: str, model_dir: Path | None = None) -> Defaults:
    """The defaults of a model; an embedded one keeps its own in its config.json."""
    if name != "tiny":  # a pipeline of somebody's own has Wan's
        return REAL_MODELS[name][1] if name in REAL_MODELS else Defaults()
    folder = model_dir or TINY_DIR
    try:
        own = dict(read_tiny_config(folder)["defaults"])
    except (KeyError, TypeError, ValueError) as error:
        raise _no_config(folder, error) from error
    known = {f.name for f in dataclasses.fields(Defaults)}
    return Defaults(**{"dtype": "float32", **{key: own[key] for key in own.keys() & known}})


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


def weight_files(options: LoadOptions, components: Collection[str] = COMPONENTS) -> dict[str, list[Path]]:
    """The weight files of each component, fetched first where they are not there yet.

    A model without a skip_branch has no file of it, which is no error.

    Raises:
        RunError: they could not be fetched.
        InputError: --model_dir lacks some.
    """
    if "text_encoder" in components:
        tokenizer_folder(options)
    return {
        name: _skip_branch(options) if name == SKIP_BRANCH else _component_files(options, name)
        for name in components
    }


def _component_files(options: LoadOptions, name: str) -> list[Path]:
    if options.model not in REAL_MODELS:
        return _existing(options.model_dir or TINY_DIR, [f"{name}.safetensors"], name)
    if options.model_dir is not None:
        return _in_folder(options.model_dir, options.model, name)
    return _fetch(*_published(options.model, name))


def _skip_branch(options: LoadOptions) -> list[Path]:
    """No branch was published for a real model."""
    path = (options.model_dir or TINY_DIR) / f"{SKIP_BRANCH}.safetensors"
    return [path] if options.model not in REAL_MODELS and path.is_file() else []


def _published(model: str, component: str) -> tuple[str, str]:
    """ModelScope model id and file pattern of a component."""
    if component == "dit":
        return REAL_MODELS[model][0], "diffusion_pytorch_model*.safetensors"
    return SHARED_FILES[component]


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
    model_id, pattern = _published(model, component)
    own_id, original = REAL_MODELS[model][0], pattern.replace(".safetensors", ".pth")
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
    if options.model not in REAL_MODELS:
        where, candidates = options.model_dir or TINY_DIR, ["tokenizer/"]
    elif options.model_dir is None:
        return _fetch(model_id, folder)[0]
    else:
        where = options.model_dir
        candidates = [folder, f"{model_id}/{folder}", f"{REAL_MODELS[options.model][0]}/{folder}"]
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
