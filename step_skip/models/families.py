"""Define the Wan models in two tables: the inputs of each kind of network, and the published weights.

    FAMILIES   kinds of networks: their latents, their input images, the tensors of those images that a prior
               keeps; a prior's metadata names its family
    MODELS     published weights by the names that --model takes: files in the order of loading, sizes,
               settings

DiffSynth recognises a checkpoint by its keys and shapes. They distinguish neither 480P from 720P nor the
high-noise expert from the low-noise one: of two experts the first that is loaded becomes `dit`, the second
`dit2`.

Sources: parameters counted on diffsynth 2.1.12's own classes; dtypes of the files from their published sizes;
settings from generate.py and wan/configs of Wan2.1 and Wan2.2, for T2V-1.3B from Wan2.1's readme, for Fun
from VideoX-Fun's examples/wan2.1_fun/predict_i2v.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

Need = Literal["none", "optional", "required"]
ShapePattern = tuple[int | str, ...]  # "T", "H" and "W" stand for the latents' own sizes

# Wan's usual negative prompt, from the examples of Wan2.1 and DiffSynth-Studio.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


# --- kinds of networks --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Family:
    """The inputs and the latents of one kind of network.

    conditioning: shapes of the tensors that the pipeline computes from the images, by its own names; a prior
        keeps these tensors instead of the images.
    experts: the pipeline's names of the networks, the one for high noise first.
    """

    latent_channels: int = 16  # z_dim of the VAE
    spatial_factor: int = 8  # pixels per latent, height and width; the DiT's patches are 2 x 2 latents
    temporal_factor: int = 4  # frames per latent, after the first
    image: Need = "none"
    end_image: Need = "none"
    conditioning: Mapping[str, ShapePattern] = field(default_factory=dict)
    experts: tuple[str, ...] = ("dit",)

    @property
    def components(self) -> tuple[str, ...]:
        """Return the components of the pipeline that a full run needs."""
        image_encoder = ("image_encoder",) if "clip_feature" in self.conditioning else ()
        return (*self.experts, "vae", "text_encoder", *image_encoder)


Y: Final[ShapePattern] = (1, 20, "T", "H", "W")  # 4 channels of the mask and 16 of the encoded images
CLIP_FEATURE: Final[ShapePattern] = (1, 257, 1280)
CLIP_OF_TWO: Final[ShapePattern] = (1, 514, 1280)
FIRST_FRAME: Final[ShapePattern] = (1, 48, 1, "H", "W")

FAMILIES: Final[Mapping[str, Family]] = {
    "T2V": Family(),
    "InP": Family(
        image="required", end_image="optional", conditioning={"y": Y, "clip_feature": CLIP_FEATURE}
    ),
    "I2V": Family(image="required", conditioning={"y": Y, "clip_feature": CLIP_FEATURE}),
    "FLF2V": Family(
        image="required", end_image="required", conditioning={"y": Y, "clip_feature": CLIP_OF_TWO}
    ),
    "TI2V": Family(  # the first frame is fused into the latents
        latent_channels=48,
        spatial_factor=16,
        image="optional",
        conditioning={"first_frame_latents": FIRST_FRAME},
    ),
    "I2V-A14B": Family(
        image="required", end_image="optional", conditioning={"y": Y}, experts=("dit", "dit2")
    ),
    "T2V-A14B": Family(experts=("dit", "dit2")),
}
DEFAULT_FAMILY: Final = "I2V"  # family of priors that name none; when they were made there was no other


def expert_of(timestep: float, boundary: float | None) -> str:
    """Return the network that WanVideoPipeline uses at a timestep: "dit2" below the boundary, else "dit".

    Args:
        timestep: 0 ... 1000.
        boundary: switch_DiT_boundary, 0 ... 1; None: there is only one network.
    """
    return "dit2" if boundary is not None and timestep < boundary * 1000 else "dit"


# --- published weights --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """The files of one component."""

    model_id: str  # on ModelScope
    pattern: str  # glob of the files
    model_hash: str  # DiffSynth's hash of keys and shapes
    parameters: int  # number of parameters that are loaded
    file_bytes: int  # size of the files


@dataclass(frozen=True)
class Defaults:
    """The default settings of a model, named as the arguments of WanVideoPipeline."""

    height: int = 480
    width: int = 832
    num_frames: int = 81
    fps: float = 16
    cfg_scale: float = 5.0  # of two experts, guidance of the high-noise one
    cfg_scale_2: float | None = None  # guidance of the low-noise expert; None: cfg_scale
    sigma_shift: float = 5.0
    switch_DiT_boundary: float | None = None  # None: there is only one network
    negative_prompt: str = WAN_NEGATIVE_PROMPT
    dtype: str = "bfloat16"
    any_size: bool = True  # a size that isn't given gets this area and the image's aspect ratio


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published model: its family, its files in the order of loading, its settings."""

    model_id: str
    family: str
    weights: Mapping[str, Weights]  # by component
    defaults: Defaults = Defaults()
    num_inference_steps: int = 50  # used by the model's authors; a prior's default is that of PriorChoices


CONVERTED = "DiffSynth-Studio/Wan-Series-Converted-Safetensors"  # where DiffSynth redirects the .pth files
TOKENIZER = ("Wan-AI/Wan2.1-T2V-1.3B", "google/umt5-xxl/")
VAE_21 = Weights(
    CONVERTED, "Wan2.1_VAE.safetensors", "ccc42284ea13e1ad04693284c7a09be6", 126_892_531, 507_570_124
)
VAE_22 = Weights(
    CONVERTED, "Wan2.2_VAE.safetensors", "e1de6c02cdac79f8b739f4d3698cd216", 704_688_668, 2_818_754_672
)
TEXT_ENCODER = Weights(
    CONVERTED,
    "models_t5_umt5-xxl-enc-bf16.safetensors",
    "9c8818c2cbea55eca56c7b447df170da",
    5_680_910_336,
    11_361_820_672,
)
IMAGE_ENCODER = Weights(  # the file is float32 and has a text tower, too, which is not loaded
    CONVERTED,
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors",
    "5941c53e207d62f20f9025686193c40b",
    632_076_801,
    4_772_059_140,
)


def _published(
    model_id: str,
    family: str,
    model_hash: str,
    *,
    parameters: int,
    stored_bytes: int = 4,  # per parameter
    folders: tuple[str, ...] = ("",),
    vae: Weights = VAE_21,
    defaults: Defaults = Defaults(),
    num_inference_steps: int = 50,
) -> Published:
    """Return a published model with the shared files after its own.

    Args:
        parameters, stored_bytes: number of parameters of each expert, and bytes per parameter in its files.
        folders: the folder of each expert, in their order.
    """
    kind = FAMILIES[family]
    pattern = "diffusion_pytorch_model*.safetensors"
    networks = {
        expert: Weights(model_id, folder + pattern, model_hash, parameters, parameters * stored_bytes)
        for expert, folder in zip(kind.experts, folders, strict=True)
    }
    shared = {"vae": vae, "text_encoder": TEXT_ENCODER, "image_encoder": IMAGE_ENCODER}
    return Published(
        model_id=model_id,
        family=family,
        weights={**networks, **{name: shared[name] for name in kind.components if name in shared}},
        defaults=defaults,
        num_inference_steps=num_inference_steps,
    )


I2V_14B, T2V_14B = 16_394_878_784, 14_288_491_584  # parameters
I2V_HASH, T2V_HASH = "6bfcfb3b342cb286ce886889d519a77e", "aafcfd9672c3a2456dc46e1cb6e52c70"
LARGE = Defaults(height=720, width=1280)

MODELS: Final[Mapping[str, Published]] = {
    "I2V-480P": _published(  # sigma_shift 5 as in DiffSynth's examples; Wan's own code has 3 at this size
        "Wan-AI/Wan2.1-I2V-14B-480P", "I2V", I2V_HASH, parameters=I2V_14B, num_inference_steps=40
    ),
    "I2V-720P": _published(
        "Wan-AI/Wan2.1-I2V-14B-720P",
        "I2V",
        I2V_HASH,
        parameters=I2V_14B,
        defaults=LARGE,
        num_inference_steps=40,
    ),
    "Fun-1.3B-InP": _published(
        "PAI/Wan2.1-Fun-1.3B-InP",
        "InP",
        "6d6ccde6845b95ad9114ab993d917893",
        parameters=1_564_428_608,
        stored_bytes=2,
        defaults=Defaults(cfg_scale=6.0, sigma_shift=3.0),
    ),
    "T2V-1.3B": _published(
        "Wan-AI/Wan2.1-T2V-1.3B",
        "T2V",
        "9269f8db9040a9d860eaca435be61814",
        parameters=1_418_996_800,
        defaults=Defaults(cfg_scale=6.0, sigma_shift=8.0),
    ),
    "T2V-14B": _published("Wan-AI/Wan2.1-T2V-14B", "T2V", T2V_HASH, parameters=T2V_14B, defaults=LARGE),
    "FLF2V-14B": _published(
        "Wan-AI/Wan2.1-FLF2V-14B-720P",
        "FLF2V",
        "3ef3b1f8e1dab83d5b71fd7b617f859f",
        parameters=16_395_536_704,
        defaults=replace(LARGE, sigma_shift=16.0),
    ),
    "TI2V-5B": _published(
        "Wan-AI/Wan2.2-TI2V-5B",
        "TI2V",
        "1f5ab7703c6fc803fdded85ff040c316",
        parameters=4_999_787_712,
        vae=VAE_22,
        defaults=Defaults(height=704, width=1280, num_frames=121, fps=24),
    ),
    "I2V-A14B": _published(
        "Wan-AI/Wan2.2-I2V-A14B",
        "I2V-A14B",
        "5b013604280dd715f8457c6ed6d6a626",
        parameters=14_288_901_184,
        folders=("high_noise_model/", "low_noise_model/"),
        defaults=replace(LARGE, cfg_scale=3.5, switch_DiT_boundary=0.9),
        num_inference_steps=40,
    ),
    "T2V-A14B": _published(
        "Wan-AI/Wan2.2-T2V-A14B",
        "T2V-A14B",
        T2V_HASH,
        parameters=T2V_14B,
        folders=("high_noise_model/", "low_noise_model/"),
        defaults=replace(LARGE, cfg_scale=4.0, cfg_scale_2=3.0, sigma_shift=12.0, switch_DiT_boundary=0.875),
        num_inference_steps=40,
    ),
}
MODEL_NAMES: Final = (*MODELS, "tiny")


def latents_shape(
    *, height: int, width: int, num_frames: int, family: Family = FAMILIES[DEFAULT_FAMILY]
) -> tuple[int, ...]:
    """Return the shape [B, C, T, H, W] of the latents of a clip of this size (pixels, frames)."""
    frames = (num_frames - 1) // family.temporal_factor + 1
    factor = family.spatial_factor
    return (1, family.latent_channels, frames, height // factor, width // factor)


def round_sizes(
    *, height: int, width: int, num_frames: int, family: Family = FAMILIES[DEFAULT_FAMILY]
) -> dict[str, int]:
    """Round sizes up as WanVideoPipeline does silently (`check_resize_height_width`)."""
    pixels, frames = 2 * family.spatial_factor, family.temporal_factor  # the DiT's patches are 2 x 2 latents
    return {
        "height": math.ceil(height / pixels) * pixels,
        "width": math.ceil(width / pixels) * pixels,
        "num_frames": math.ceil((num_frames - 1) / frames) * frames + 1,
    }
