"""Build and load the embedded model: DiffSynth's own classes at the small sizes of a folder's config.json.

`load_tiny_modules` and `load_tiny_tokenizer` load it; `warn_of_embedded` warns of prompts and sizes that it
was not trained for. torch and diffsynth are imported by the functions that need them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from step_skip.errors import InputError
from step_skip.models.families import DEFAULT_FAMILY, FAMILIES
from step_skip.models.weights import COMPONENTS, TINY_DIR, LoadOptions, model_defaults, read_tiny_config

if TYPE_CHECKING:
    import torch
    from diffsynth.models.wan_video_text_encoder import HuggingfaceTokenizer
    from diffsynth.models.wan_video_vae import WanVideoVAE

log = logging.getLogger(__name__)


def build_tiny(
    config: dict, *, seed: int = 0, only: Collection[str] | None = None
) -> dict[str, torch.nn.Module]:
    """Build untrained modules at the config's sizes, in float32.

    Args:
        config: content of config.json.
        seed: of the random weights.
        only: components to build; None: all of the config's family.
    """
    import torch

    builders = {
        "dit": _build_dit,
        "dit2": _build_dit,
        "text_encoder": _build_text_encoder,
        "image_encoder": _build_image_encoder,
        "vae": _build_vae,
    }
    modules = {}
    with torch.random.fork_rng(devices=[]):
        for name in embedded_components(config) if only is None else only:
            torch.manual_seed(seed + (name == "dit2"))  # the two experts differ
            modules[name] = builders[name](config).eval().requires_grad_(False)
    return modules


def embedded_components(config: dict) -> tuple[str, ...]:
    """Return the components of an embedded model's family."""
    return FAMILIES[config.get("family", DEFAULT_FAMILY)].components


def load_tiny_modules(
    folder: Path = TINY_DIR, *, only: Collection[str] | None = None
) -> dict[str, torch.nn.Module]:
    """Load the trained modules in float32, whatever the files' dtype; a skip_branch is attached to the DiT.

    Args:
        only: components to load; None: all of the model's family.
    """
    from safetensors.torch import load_file

    from step_skip.method.skip_cache import Branch

    config = read_tiny_config(folder)
    only = embedded_components(config) if only is None else only
    modules = build_tiny(config, only=[name for name in COMPONENTS if name in only])
    for name, module in modules.items():
        stored = load_file(Path(folder) / f"{name}.safetensors")
        weights = {key: value.float() for key, value in stored.items()}
        if name == "vae":
            set_latent_statistics(module, weights.pop("mean"), weights.pop("std"))
        module.load_state_dict(weights)
    if "skip_branch" in only:
        modules["dit"].skip_branch = Branch(**load_file(Path(folder) / "skip_branch.safetensors"))
    return modules


def load_tiny_tokenizer(folder: Path = TINY_DIR) -> HuggingfaceTokenizer:
    """Load the word-level tokenizer in `folder/tokenizer`.

    Raises:
        InputError: the tokenizer is damaged.
    """
    from diffsynth.models.wan_video_text_encoder import HuggingfaceTokenizer

    seq_len = read_tiny_config(folder)["tokenizer"]["seq_len"]
    try:
        return HuggingfaceTokenizer(name=str(folder / "tokenizer"), seq_len=seq_len, clean="whitespace")
    except Exception as error:  # tokenizers raises bare Exceptions for a damaged file
        raise InputError(
            f"the tokenizer in {folder} is damaged ({type(error).__name__}); copy the model's folder again"
        ) from error


def set_latent_statistics(vae: WanVideoVAE, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Set the channels' mean and std, [z_dim] each, which are plain attributes of WanVideoVAE."""
    vae.mean, vae.std = mean, std
    vae.scale = [mean, 1.0 / std]


def _build_dit(config: dict) -> torch.nn.Module:
    import torch
    from diffsynth.models.wan_video_dit import MLP, WanModel

    sizes = dict(config["dit"])
    sizes["patch_size"] = tuple(sizes["patch_size"])
    dit = WanModel(**sizes)
    if dit.has_image_input:  # WanModel's own img_emb has fixed sizes: 1280 channels, 514 tokens of two images
        encoder = config["image_encoder"]
        dit.img_emb = MLP(encoder["vision_dim"], sizes["dim"], has_pos_emb=dit.has_image_pos_emb)
        if dit.has_image_pos_emb:
            tokens = (encoder["image_size"] // encoder["patch_size"]) ** 2 + 1
            dit.img_emb.emb_pos = torch.nn.Parameter(torch.randn(1, 2 * tokens, encoder["vision_dim"]))
    return dit


def _build_text_encoder(config: dict) -> torch.nn.Module:
    from diffsynth.models.wan_video_text_encoder import WanTextEncoder

    return WanTextEncoder(**config["text_encoder"])


def _build_image_encoder(config: dict) -> torch.nn.Module:
    """Build a WanImageEncoder around a small CLIP; its own constructor would allocate ViT-H."""
    import torch
    from diffsynth.models.wan_video_image_encoder import WanImageEncoder, clip_xlm_roberta_vit_h_14

    encoder = WanImageEncoder.__new__(WanImageEncoder)
    torch.nn.Module.__init__(encoder)
    encoder.model, encoder.transforms = clip_xlm_roberta_vit_h_14(
        return_transforms=True, device="cpu", **config["image_encoder"]
    )
    return encoder


def _build_vae(config: dict) -> torch.nn.Module:
    """Build a WanVideoVAE around a small VideoVAE_; its own full-size one is created on the meta device only.

    The VAE of Wan2.2's 5B is WanVideoVAE38; only its config has `dec_dim`.
    """
    import torch
    from diffsynth.models.wan_video_vae import VideoVAE38_, VideoVAE_, WanVideoVAE, WanVideoVAE38

    sizes = config["vae"]
    kind, inner = (WanVideoVAE38, VideoVAE38_) if "dec_dim" in sizes else (WanVideoVAE, VideoVAE_)
    with torch.device("meta"):
        vae = kind(z_dim=sizes["z_dim"])
    vae.model = inner(**sizes)
    set_latent_statistics(vae, torch.zeros(sizes["z_dim"]), torch.ones(sizes["z_dim"]))
    return vae


MAX_LISTED_WORDS = 5  # unknown words that a warning lists


def warn_of_embedded(
    options: LoadOptions, prompts: Iterable[str], sizes: Mapping[str, int] | None = None
) -> None:
    """Warn in one line of prompts and sizes the embedded model was not trained for; ignore other models.

    Args:
        prompts: the prompts of the run.
        sizes: height, width and num_frames; None: the prior's sizes, of which its own run has warned.
    """
    if options.model != "tiny":
        return
    folder = options.model_dir or TINY_DIR
    config = read_tiny_config(folder)
    if "motions" not in config:  # the config doesn't list the motions the model knows
        return
    warnings = word_warnings(folder, prompts, most=config["tokenizer"]["seq_len"] - 1)
    if warnings:
        warnings.append(f"try: {', '.join(config['motions'])}")
    defaults = model_defaults("tiny", options.model_dir)
    made_for = {name: getattr(defaults, name) for name in ("width", "height", "num_frames")}
    if sizes is not None and any(sizes[name] != value for name, value in made_for.items()):
        shape = "{width} x {height} pixels, {num_frames} frames"
        warnings.append(f"it was trained for {shape.format(**made_for)}, not {shape.format(**sizes)}")
    if warnings:
        log.warning(f"the embedded model may not follow this prompt: {'; '.join(warnings)}")


def word_warnings(folder: Path, prompts: Iterable[str], *, most: int) -> list[str]:
    """Return warnings of words that a model's tokenizer doesn't know and of prompts that it truncates.

    Args:
        folder: of the model.
        most: number of words that the model reads of a prompt.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    warnings: list[str] = []
    unknown: dict[str, None] = {}
    for prompt in prompts:
        found = tokenizer.encode(prompt, add_special_tokens=False)
        for token, (begin, end) in zip(found.tokens, found.offsets, strict=True):
            if token == tokenizer.model.unk_token:
                unknown[prompt[begin:end]] = None
        if len(found.tokens) > most:
            warnings.append(f'it reads {most} words, and "{prompt[:40]}..." has {len(found.tokens)}')
    if unknown:
        words = ", ".join(f'"{word}"' for word in list(unknown)[:MAX_LISTED_WORDS])
        others = len(unknown) - MAX_LISTED_WORDS
        warnings.insert(0, f"it doesn't know {words}{f' and {others} others' if others > 0 else ''}")
    return warnings
