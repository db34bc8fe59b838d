"""The embedded model as a pipeline of diffusers: the same weights in diffusers' and transformers' classes.

    from embedded import embedded_pipeline
    pipe = embedded_pipeline()          # a WanImageToVideoPipeline, on the CPU

Names are changed and what those classes split is split; no value is.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.models import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from step_skip.models.weights import TINY_DIR

Weights = dict[str, torch.Tensor]

TEXT_NAMES = (
    (r"^token_embedding", "shared"),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.", r"encoder.block.\1."),
    (r"\.norm1\.", ".layer.0.layer_norm."),
    (r"\.norm2\.", ".layer.1.layer_norm."),
    (r"\.attn\.", ".layer.0.SelfAttention."),
    (r"\.pos_embedding\.embedding\.", ".layer.0.SelfAttention.relative_attention_bias."),
    (r"\.ffn\.gate\.0\.", ".layer.1.DenseReluDense.wi_0."),
    (r"\.ffn\.fc1\.", ".layer.1.DenseReluDense.wi_1."),
    (r"\.ffn\.fc2\.", ".layer.1.DenseReluDense.wo."),
)
IMAGE_NAMES = (
    (r"^cls_embedding", "embeddings.class_embedding"),
    (r"^patch_embedding", "embeddings.patch_embedding"),
    (r"^pos_embedding", "embeddings.position_embedding.weight"),
    (r"^pre_norm", "pre_layrnorm"),
    (r"^post_norm", "post_layernorm"),
    (r"^transformer\.", "encoder.layers."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.out_proj."),
    (r"\.attn\.(.)\.", r".self_attn.\1_proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.2\.", ".mlp.fc2."),
)
VAE_NAMES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.downsamples\.", ".down_blocks."),
)


class ShortText(WanAttnProcessor):
    """Cross-attention to texts of fewer tokens than the 512 that diffusers takes for granted.

    The text is repeated up to 512 tokens: attention to keys that come as often as each other is the same.
    """

    def __init__(self, text_tokens: int):
        super().__init__()
        self.text_tokens = text_tokens

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        """As WanAttnProcessor; encoder_hidden_states: [B, image tokens + text_tokens, C]"""
        if encoder_hidden_states is not None:
            text = encoder_hidden_states[:, -self.text_tokens :]
            more = text.repeat(1, 512 // self.text_tokens - 1, 1)
            encoder_hidden_states = torch.cat([encoder_hidden_states, more], dim=1)
        return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def embedded_pipeline(folder: Path = TINY_DIR) -> WanImageToVideoPipeline:
    """The embedded model in `folder`, in float32 on the CPU."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        folder / "tokenizer", model_max_length=config["tokenizer"]["seq_len"]
    )
    network = transformer(config["dit"], read(folder, "dit"), image_dim=config["image_encoder"]["vision_dim"])
    network.set_attn_processor(ShortText(config["tokenizer"]["seq_len"]))
    side = config["image_encoder"]["image_size"]
    return WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder(config["text_encoder"], read(folder, "text_encoder")),
        image_encoder=image_encoder(config["image_encoder"], read(folder, "image_encoder")),
        image_processor=CLIPImageProcessor(size={"height": side, "width": side}, do_center_crop=False),
        transformer=network,
        vae=vae(config["vae"], read(folder, "vae")),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config["defaults"]["sigma_shift"]),
    )


def transformer(sizes: Mapping, weights: Weights, *, image_dim: int) -> WanTransformer3DModel:
    """WanModel as diffusers has it; the names are changed by diffusers itself."""
    network = WanTransformer3DModel(
        patch_size=tuple(sizes["patch_size"]),
        num_attention_heads=sizes["num_heads"],
        attention_head_dim=sizes["dim"] // sizes["num_heads"],
        in_channels=sizes["in_dim"],
        out_channels=sizes["out_dim"],
        text_dim=sizes["text_dim"],
        freq_dim=sizes["freq_dim"],
        ffn_dim=sizes["ffn_dim"],
        num_layers=sizes["num_layers"],
        eps=sizes["eps"],
        image_dim=image_dim,
        added_kv_proj_dim=sizes["dim"],
    )
    return filled(network, convert_wan_transformer_to_diffusers(weights))


def text_encoder(sizes: Mapping, weights: Weights) -> UMT5EncoderModel:
    """WanTextEncoder as transformers has it."""
    config = UMT5Config(
        vocab_size=sizes["vocab"],
        d_model=sizes["dim"],
        d_kv=sizes["dim_attn"] // sizes["num_heads"],
        d_ff=sizes["dim_ffn"],
        num_heads=sizes["num_heads"],
        num_layers=sizes["num_layers"],
        feed_forward_proj="gated-gelu",
    )
    weights = renamed(weights, TEXT_NAMES)
    return filled(
        UMT5EncoderModel(config), weights | {"encoder.embed_tokens.weight": weights["shared.weight"]}
    )


def image_encoder(sizes: Mapping, weights: Weights) -> CLIPVisionModel:
    """The picture half of XLMRobertaCLIP as transformers has it."""
    config = CLIPVisionConfig(
        hidden_size=sizes["vision_dim"],
        intermediate_size=4 * sizes["vision_dim"],
        num_hidden_layers=sizes["vision_layers"],
        num_attention_heads=sizes["vision_heads"],
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        hidden_act="gelu",
    )
    prefix = "model.visual."
    weights = {name.removeprefix(prefix): value for name, value in weights.items() if prefix in name}
    del weights["head"]  # what text is compared with
    for name in [name for name in weights if ".to_qkv." in name]:
        for part, value in zip("qkv", weights.pop(name).chunk(3), strict=True):
            weights[name.replace("to_qkv", part)] = value
    weights = renamed(weights, IMAGE_NAMES)
    weights["embeddings.class_embedding"] = weights["embeddings.class_embedding"].flatten()
    weights["embeddings.position_embedding.weight"] = weights["embeddings.position_embedding.weight"][0]
    return filled(CLIPVisionModel(config), weights)


def vae(sizes: Mapping, weights: Weights) -> AutoencoderKLWan:
    """WanVideoVAE as diffusers has it."""
    network = AutoencoderKLWan(
        base_dim=sizes["dim"],
        z_dim=sizes["z_dim"],
        dim_mult=sizes["dim_mult"],
        num_res_blocks=sizes["num_res_blocks"],
        latents_mean=weights.pop("mean").tolist(),
        latents_std=weights.pop("std").tolist(),
    )
    blocks = sizes["num_res_blocks"] + 1

    def place(match: re.Match) -> str:
        level, block = divmod(int(match[1]), blocks + 1)
        return f"up_blocks.{level}." + (f"resnets.{block}" if block < blocks else "upsamplers.0")

    weights = {name.removeprefix("model."): value for name, value in weights.items()}
    weights = {re.sub(r"upsamples\.(\d+)", place, name): value for name, value in weights.items()}
    return filled(network, renamed(weights, VAE_NAMES))


def read(folder: Path, component: str) -> Weights:
    """A component's weights in float32."""
    return {name: value.float() for name, value in load_file(folder / f"{component}.safetensors").items()}


def renamed(weights: Weights, names: Iterable[tuple[str, str]]) -> Weights:
    """The same values by other names."""
    made = {}
    for name, value in weights.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        made[name] = value
    return made


def filled(network: torch.nn.Module, weights: Weights) -> torch.nn.Module:
    """The network with these weights, each of them and no other."""
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)
