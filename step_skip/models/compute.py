"""What computes: which attention DiffSynth found, blocks compiled by torch, matrices quantised.

Each of them changes a run's last bits, so a run records them.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Final

from step_skip.errors import InputError

if TYPE_CHECKING:
    from diffsynth.core.quant import QuantizeConfig
    from diffsynth.pipelines.wan_video import WanVideoPipeline

# DiffSynth's own names of what --quantize offers (diffsynth/core/quant/backends/torchao.py)
QUANTIZATIONS: Final = {"fp8": "torchao_fp8_w8a16"}  # weights in 8 bits, computed in the pipeline's dtype
# linear layers outside the blocks: a thousandth of the weights, and all of time and text passes through them
NOT_QUANTIZED: Final = [
    *(f"{name}.{place}" for name in ("text_embedding", "time_embedding") for place in (0, 2)),
    *(f"img_emb.proj.{place}" for place in (1, 3)),
    "time_projection.1",
    "head.head",
]
OFF: Final = "off"  # takes back what a prior was made with


def attention_backend() -> str:
    """The attention that DiffSynth's Wan uses here, by what is installed (models/wan_video_dit.py)."""
    from diffsynth.models import wan_video_dit

    for name, there in (
        ("flash_attention_3", wan_video_dit.FLASH_ATTN_3_AVAILABLE),
        ("flash_attention_2", wan_video_dit.FLASH_ATTN_2_AVAILABLE),
        ("sage_attention", wan_video_dit.SAGE_ATTN_AVAILABLE),
    ):
        if there:
            return name
    return "torch"


def inherited(given: str | None, recorded: str | None) -> str | None:
    """What a run computes with: what was given, else what its prior was made with; OFF is none."""
    chosen = given or recorded
    return None if chosen == OFF else chosen


def check_compute(*, vram: str, quantize: str | None, compile: str | None) -> None:
    """Refuse what can't be had here, before anything is loaded.

    Raises:
        InputError: naming the flag.
    """
    if quantize is not None and vram not in ("auto", "plain"):
        raise InputError(
            f"--quantize {quantize} keeps the whole DiT on the GPU, and --vram {vram} doesn't: leave one out"
        )
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise InputError(f"--quantize {str(quantize)[:40]!r}: expected one of {', '.join(QUANTIZATIONS)}")
    if quantize is not None:
        _quantize_config(quantize)
    if compile is not None:
        import torch

        if compile not in (known := torch.compiler.list_backends(exclude_tags=())):
            raise InputError(
                f"--compile {str(compile)[:40]!r}: torch has no such backend; use one of {', '.join(known)}"
            )


def _quantize_config(method: str) -> QuantizeConfig:
    from diffsynth.core.quant import QuantizeConfig

    try:
        with contextlib.redirect_stdout(sys.stderr):
            return QuantizeConfig(method=QUANTIZATIONS[method], exclude_modules=NOT_QUANTIZED)
    except ImportError as error:
        raise InputError(
            f"--quantize {method} needs torchao, which is not installed: pip install torchao"
        ) from error


def quantize_network(pipe: WanVideoPipeline, name: str, method: str, *, device: str) -> None:
    """Quantise the blocks of `dit` or `dit2` layer by layer, from wherever they are onto the device.

    Raises:
        InputError: this device can't.
    """
    config, network = _quantize_config(method), getattr(pipe, name)
    try:
        config.quantize_model(network, compute_device=device, model_device=device)
    except AssertionError as error:  # torchao's way of naming the hardware it needs
        raise InputError(f"--quantize {method}: {error}") from error
    network.to(device)
    network.quantize_config = config  # DiffSynth's load_lora asks for it


def compile_network(pipe: WanVideoPipeline, name: str, backend: str) -> None:
    """Compile the blocks of `dit` or `dit2`, by DiffSynth's own means."""
    pipe.compile_pipeline(compile_models=[name], backend=backend)
