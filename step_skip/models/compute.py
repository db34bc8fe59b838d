"""Detect DiffSynth's attention, compile a DiT's blocks with torch, and quantise its matrices.

Each of them changes the last bits of a run's result, so a run records them.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Final

from step_skip.errors import InputError

if TYPE_CHECKING:
    from diffsynth.core.quant import QuantizeConfig
    from diffsynth.pipelines.wan_video import WanVideoPipeline

# Values of --quantize and DiffSynth's names for them (diffsynth/core/quant/backends/torchao.py): weights in
# 8 bits, computed in the pipeline's dtype.
QUANTIZATIONS: Final = {"fp8": "torchao_fp8_w8a16"}
# Linear layers outside the blocks: they have a thousandth of the weights and process all of time and text.
NOT_QUANTIZED: Final = [
    *(f"{name}.{index}" for name in ("text_embedding", "time_embedding") for index in (0, 2)),
    *(f"img_emb.proj.{index}" for index in (1, 3)),
    "time_projection.1",
    "head.head",
]
OFF: Final = "off"  # value of a flag that turns off the prior's recorded choice


def attention_backend() -> str:
    """Return DiffSynth's attention for Wan with the packages installed here (models/wan_video_dit.py)."""
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
    """Return the given value of a flag, else the one recorded by the prior; None for OFF."""
    chosen = given or recorded
    return None if chosen == OFF else chosen


def check_compute(*, vram: str, quantize: str | None, compile: str | None) -> None:
    """Check --quantize and --compile before anything is loaded.

    Raises:
        InputError: a value is unknown, not supported here, or contradicts --vram; the message names the flag.
    """
    if quantize is not None and vram not in ("auto", "plain"):
        raise InputError(
            f"--quantize {quantize} needs the DiT on the GPU, and --vram {vram} offloads it; leave one out"
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
    """Quantise the blocks of `dit` or `dit2` layer by layer, from any device onto the given one.

    Raises:
        InputError: the device doesn't support the method.
    """
    config, network = _quantize_config(method), getattr(pipe, name)
    try:
        config.quantize_model(network, compute_device=device, model_device=device)
    except AssertionError as error:  # torchao names the hardware it needs by an assertion
        raise InputError(f"--quantize {method}: {error}") from error
    network.to(device)
    network.quantize_config = config  # DiffSynth's load_lora reads it


def compile_network(pipe: WanVideoPipeline, name: str, backend: str) -> None:
    """Compile the blocks of `dit` or `dit2` with DiffSynth's own compile_pipeline."""
    pipe.compile_pipeline(compile_models=[name], backend=backend)
