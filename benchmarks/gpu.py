"""On a CUDA GPU: bit-exactness in bfloat16, and the time of a full-size DiT with random weights.

    python benchmarks/gpu.py --output benchmarks/results/gpu.json

Exactness runs the two scripts on the embedded model, resumed at every step and differentially. The timing
needs some 40 GB of VRAM: a WanModel of the I2V-14B's sizes with random bfloat16 weights, at 480P and 81
frames. Its output means nothing; its cost is that of the real one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from picture import run

from step_skip.files import write_json
from step_skip.prior import RunSettings, latents_shape

# Wan2.1-I2V-14B: diffsynth/configs/model_configs.py
FULL_SIZE = {
    "has_image_input": True,
    "patch_size": (1, 2, 2),
    "in_dim": 36,
    "dim": 5120,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "text_dim": 4096,
    "out_dim": 16,
    "num_heads": 40,
    "num_layers": 40,
    "eps": 1e-6,
}


KINDS = (  # name, start_step, skip_cache
    ("resumed after 6", 6, None),
    ("full", -1, None),
    ("resumed after 6, skip-cache 2", 6, 2),
    ("full, skip-cache 2", -1, 2),
    ("full, skip-cache 3", -1, 3),
)


def exactness(image: Path, dtype: str) -> dict:
    """Resume at every step, and differentially, with the prior's own prompt and compare latents_sha256."""
    with tempfile.TemporaryDirectory() as folder:
        model = ("--device", "cuda", "--dtype", dtype)
        prompt = ("--prompt", "the character speaks", "--output_dir", folder)
        prior = run("generate_prior.py", "--model", "tiny", *model, "--image", image, *prompt)
        expected = json.loads((prior / "run_metadata.json").read_text())["latents_sha256"]
        equal = {}
        for flags in (*(("--start_step", step) for step in range(10)), ("--num_steps", 3)):
            video = run("infer_from_prior.py", "--prior_dir", prior, *flags, *model)
            report = json.loads(video.with_suffix(".json").read_text())
            equal[" ".join(map(str, flags))] = report["latents_sha256"] == expected
    return {"dtype": dtype, "latents_sha256_equal": equal, "all": all(equal.values())}


def random_dit(sizes: dict, device: str):
    """A WanModel of these sizes, random bfloat16 weights, made on the device."""
    import torch
    from diffsynth.models.wan_video_dit import WanModel

    with torch.device("meta"):
        dit = WanModel(**sizes)
    freqs = WanModel(**{**sizes, "num_layers": 0}).freqs  # not a parameter
    dit = dit.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    dit.freqs = freqs
    for parameter in dit.parameters():
        parameter.normal_(0, 0.02)
    return dit


def timing(
    *,
    runs: int,
    sizes: dict = FULL_SIZE,
    height: int = 480,
    width: int = 832,
    num_frames: int = 81,
    device: str = "cuda",
) -> dict:
    """Seconds per step of a full and a resumed run, with Skip-Cache and without, in turn, not decoded.

    As from a prior, the first negative branch of a resumed run without Skip-Cache is not evaluated.
    """
    import torch
    from diffsynth.pipelines.wan_video import WanVideoPipeline

    from step_skip.hooks import Conditioning
    from step_skip.pipeline import run_scheduler
    from step_skip.schedule import ResumableScheduler

    pipe = WanVideoPipeline(device=device, torch_dtype=torch.bfloat16)
    pipe.dit = random_dit(sizes, device)
    pipe.vae = NoVae()
    settings = RunSettings(
        num_inference_steps=10,
        denoising_strength=1.0,
        sigma_shift=5.0,
        cfg_scale=5.0,
        height=height,
        width=width,
        num_frames=num_frames,
    )
    shape = latents_shape(height=height, width=width, num_frames=num_frames)
    random = {"device": device, "dtype": torch.bfloat16}
    conditioning = Conditioning(
        identity={
            "y": torch.randn(1, 20, *shape[2:], **random),
            "clip_feature": torch.randn(1, 257, 1280, **random),
        },
        context_posi=torch.randn(1, 512, sizes["text_dim"], **random),
        context_nega=torch.randn(1, 512, sizes["text_dim"], **random),
    )
    found: dict = {}
    for turn in range(runs + 1):
        for name, start_step, every in KINDS if turn else (("warm-up", 8, None),):
            started = time.perf_counter()
            result = run_scheduler(
                pipe,
                dataclasses.replace(settings, skip_cache=every),
                scheduler=ResumableScheduler(start_step=start_step),
                latents=torch.randn(shape, **random),
                conditioning=conditioning,
                known_nega=torch.randn(shape, **random) if start_step >= 0 and every is None else None,
            )
            result.latents.cpu()  # waits for the device
            found.setdefault(name, []).append(
                {
                    "seconds": time.perf_counter() - started,
                    "seconds_per_step": result.seconds_per_step,
                    "forwards": result.forwards,
                    "block_evaluations": result.block_evaluations,
                }
            )
    return found


class NoVae:
    """Stands where the VAE stands: the timing is of the DiT alone."""

    upsampling_factor = 8
    model = SimpleNamespace(z_dim=16)

    def decode(self, latents, **_):
        """One grey frame."""
        import torch

        return torch.zeros(1, 3, 1, 16, 16)


def main() -> None:
    """Run both parts and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", type=Path, default=ROOT / "data" / "tiny_wan_i2v" / "inputs" / "mila.png")
    parser.add_argument("--runs", type=int, default=2, help="full-size runs of each kind (default: 2)")
    parser.add_argument("--output", type=Path, default=HERE / "out" / "gpu.json")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu.py: error: torch sees no CUDA GPU here; this benchmark needs one")
    result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    result["exactness"] = [exactness(args.image, dtype) for dtype in ("bfloat16", "float32")]
    result["full_size"] = timing(runs=args.runs)
    result["vram_gib"] = torch.cuda.max_memory_allocated() / 2**30
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
