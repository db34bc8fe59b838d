"""On a CUDA GPU, in under eight minutes: what a step, a prior and a new prompt cost, and bit-exactness.

    python benchmarks/gpu.py

Speed is that of a DiT of Wan2.1-I2V-14B's sizes with random bfloat16 weights at 480 x 832 x 81, and of its
VAE: what comes out means nothing, the cost is that of the real ones (some 45 GB of VRAM; no weights needed).
Guided steps are timed in the bare pipeline and in ours, with Skip-Cache, compiled, in 8 bits (where torchao
is installed), and both; what a prior of 10 steps and a new prompt in 3 of them take is the sum of their steps
and the decoding. Exactness runs the two scripts, each in a process of its own, on the embedded model in
bfloat16: the prior's own prompt, resumed after every step and differentially, has to give its latents.

The JSON at --output is written after every part; what --seconds left no time for is named in it. A table with
published figures of other programs, which were not run by us, lies beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import torch
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.pipelines.wan_video import WanVideoPipeline
from picture import run

from step_skip.errors import InputError
from step_skip.files.writing import write_json
from step_skip.models.compute import check_compute, compile_network, quantize_network
from step_skip.models.families import latents_shape
from step_skip.models.machine import describe_machine, installed_versions
from step_skip.pipeline.conditioning import Conditioning
from step_skip.pipeline.hooks import ReplaceStart, hooked
from step_skip.pipeline.run import decode, run_scheduler
from step_skip.pipeline.schedulers import ResumableScheduler
from step_skip.pipeline.settings import TILING, RunSettings

GIB = 2**30
FULL_SIZE = {  # Wan2.1-I2V-14B: diffsynth/configs/model_configs.py
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
SETTINGS = RunSettings(
    num_inference_steps=10,
    denoising_strength=1.0,
    sigma_shift=5.0,
    cfg_scale=5.0,
    height=480,
    width=832,
    num_frames=81,
)
PRIOR_STEPS, NEW_STEPS = 10, 3  # a prior, and a new prompt's clip made from it
IMAGE = ROOT / "data" / "tiny_wan_i2v" / "inputs" / "mila.png"
ANCHORS = (  # published for Wan2.1-I2V-14B-480P at 81 frames; not run by us
    ("LightX2V, H200, bfloat16, 40 guided steps", "216 s a clip, 5.4 a step", "its benchmark_source.md"),
    ("LightX2V, H200, fp8, distilled to 4 steps without guidance", "14 s a clip", "its benchmark_source.md"),
    ("Diffusers, H100", "9.77 s a guided step", "LightX2V's readme"),
    ("LightX2V, H100", "5.18 s a guided step", "LightX2V's readme"),
)


# --- a model without weights --------------------------------------------------------------------------------


def random_dit(sizes: dict[str, Any], device: str) -> WanModel:
    """A WanModel of these sizes with random bfloat16 weights, made on the device."""
    with torch.device("meta"):
        dit = WanModel(**sizes)
    freqs = WanModel(**{**sizes, "num_layers": 0}).freqs  # not a parameter
    dit = dit.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    dit.freqs = freqs
    for parameter in dit.parameters():
        parameter.normal_(0, 0.02)
    return dit


class NoVae(torch.nn.Module):
    """Stands where the VAE stands while steps are timed."""

    upsampling_factor = 8
    model = SimpleNamespace(z_dim=16)

    def decode(self, latents: torch.Tensor, **_: Any) -> torch.Tensor:
        """One grey frame."""
        return torch.zeros(1, 3, 1, 16, 16)


def random_inputs(
    sizes: dict[str, Any], settings: RunSettings, device: str
) -> tuple[torch.Tensor, Conditioning]:
    """Latents and what the network sees besides."""
    height, width, num_frames = settings.size
    shape = latents_shape(height=height, width=width, num_frames=num_frames)
    random = {"device": device, "dtype": torch.bfloat16}
    return torch.randn(shape, **random), Conditioning(
        identity={
            "y": torch.randn(1, 20, *shape[2:], **random),
            "clip_feature": torch.randn(1, 257, 1280, **random),
        },
        context_posi=torch.randn(1, 512, sizes["text_dim"], **random),
        context_nega=torch.randn(1, 512, sizes["text_dim"], **random),
    )


# --- speed --------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """A pipeline with random weights, and what its steps begin with."""

    sizes: dict[str, Any]
    settings: RunSettings
    device: str
    backend: str  # of torch.compile

    def __post_init__(self) -> None:
        self.pipe = WanVideoPipeline(device=self.device, torch_dtype=torch.bfloat16)
        self.pipe.vae = NoVae()
        self.latents, self.conditioning = random_inputs(self.sizes, self.settings, self.device)
        self.renew()

    def renew(self) -> None:
        """A network as it was made."""
        self.pipe.dit = None
        self._forget()
        self.pipe.dit = random_dit(self.sizes, self.device)

    def _forget(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def bare(self, steps: int) -> float:
        """Seconds of so many guided steps in the pipeline as it is, with its own scheduler and model_fn."""
        units = [unit for unit in self.pipe.units if not unit.onload_model_names]
        units.append(ReplaceStart(self.latents, self.conditioning))
        inputs = replace(self.settings, num_inference_steps=steps).pipeline_inputs
        begin = time.perf_counter()
        with hooked(self.pipe, units=units):
            self.pipe(**inputs, **TILING, progress_bar_cmd=list)
        self.latents.sum().item()  # waits for the device
        return time.perf_counter() - begin

    def ours(self, steps: int, *, skip_cache: int | None = None) -> tuple[float, list[float]]:
        """Seconds of so many guided steps as a prior runs them, together and one by one."""
        settings = replace(self.settings, num_inference_steps=steps, skip_cache=skip_cache)
        begin = time.perf_counter()
        result = run_scheduler(
            self.pipe,
            settings,
            scheduler=ResumableScheduler(),
            latents=self.latents,
            conditioning=self.conditioning,
            progress=False,
        )
        return time.perf_counter() - begin, result.seconds_per_step

    def peak(self) -> dict[str, float] | None:
        """GiB of VRAM since the last `renew`: of tensors, and of all that torch's allocator held."""
        if self.device == "cpu":
            return None
        most, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"allocated_gib": most / GIB, "reserved_gib": held / GIB}


def time_plain(bench: Bench, *, runs: int, steps: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Bare and ours in turn, then Skip-Cache; the first step of all warms up."""
    bench.ours(1)
    pairs = [(bench.bare(steps), *bench.ours(steps)) for _ in range(runs)]
    guided = [seconds for _, _, each in pairs for seconds in each]
    bare = min(seconds for seconds, _, _ in pairs) / steps
    yield "bare pipeline", {"seconds_per_step": bare}
    full = min(guided)
    ratio = min(seconds for _, seconds, _ in pairs) / steps / bare
    yield "plain (Skip-Cache 1)", {"seconds_per_step": full, "ratio_to_bare": ratio, "peak": bench.peak()}
    for every in (2, 3):
        _, each = bench.ours(every, skip_cache=every)
        found = {"seconds_per_step": each[0], "seconds_between": min(each[1:]), "skip_cache": every}
        yield f"Skip-Cache {every}", found | {"peak": bench.peak()}


def time_changed(bench: Bench, *, steps: int, quantize: bool, compile: bool) -> dict[str, Any]:
    """Guided steps of the network in 8 bits, compiled, or both; the first one is told apart."""
    bench.renew()
    if quantize:
        check_compute(vram="plain", quantize="fp8", compile=None)
        quantize_network(bench.pipe, "dit", "fp8", device=bench.device)
    if compile:
        compile_network(bench.pipe, "dit", bench.backend)
    bench._forget()
    first, _ = bench.ours(1)
    _, each = bench.ours(steps)
    return {"seconds_per_step": min(each), "seconds_of_first_step": first, "peak": bench.peak()}


def time_decoding(bench: Bench, vae: torch.nn.Module) -> dict[str, Any]:
    """Seconds of decoding a clip, in tiles and whole frames, with the network in memory."""
    found: dict[str, Any] = {}
    bench.pipe.vae = vae.to(device=bench.device, dtype=torch.bfloat16).eval().requires_grad_(False)
    for name, tiled in (("tiles", True), ("whole frames", False)):
        bench._forget()
        begin = time.perf_counter()
        decode(bench.pipe, bench.latents, tiled=tiled)
        found[name] = {"seconds": time.perf_counter() - begin, "peak": bench.peak()}
    bench.pipe.vae = NoVae()
    return found


def with_sums(found: dict[str, Any], *, decoding: float) -> dict[str, Any]:
    """What was found of a kind of step, and what a prior and a new prompt take by it, decoded.

    A new prompt's first negative branch is the prior's: with 3 steps 5 forwards run, with Skip-Cache all 6.
    """
    every, full = found.get("skip_cache", 1), found["seconds_per_step"]
    between = found.get("seconds_between", full)
    prior, new = (
        sum(full if step % every == 0 else between for step in range(steps))
        for steps in (PRIOR_STEPS, NEW_STEPS)
    )
    new -= full / 2 if every == 1 else 0
    return found | {"seconds_per_prior": prior + decoding, "seconds_per_new_prompt": new + decoding}


# --- exactness ----------------------------------------------------------------------------------------------


def exactness(*flags: object, device: str) -> dict[str, Any]:
    """A prior of the embedded model in bfloat16, and its own prompt by every method in another process."""
    where, prompt = ("--device", device), "the character speaks"
    with tempfile.TemporaryDirectory() as folder:
        made = ("--model", "tiny", "--dtype", "bfloat16", "--image", IMAGE, "--prompt", prompt)
        prior = run("generate_prior.py", *made, *flags, *where, "--output_dir", folder)
        expected = json.loads((prior / "run_metadata.json").read_text())["latents_sha256"]
        methods = ({"start_step": "0-9"}, {"num_steps": 1}, {"num_steps": 3}, {"num_steps": 6})
        lines = Path(folder) / "prompts.txt"
        lines.write_text("\n".join(json.dumps({"prompt": prompt} | method) for method in methods))
        flags = ("--prompts_file", lines, "--output_dir", Path(folder) / "sweep", *where)
        sweep = run("infer_from_prior.py", "--prior_dir", prior, *flags)
        reports = [json.loads(path.read_text()) for path in sweep.glob("*.json")]
    equal = {str(each["steps_run"]): each["latents_sha256"] == expected for each in reports}
    return {"clips": len(reports), "exact": sum(equal.values()), "steps_run": equal}


# --- everything ---------------------------------------------------------------------------------------------


def measure(
    bench: Bench,
    vae: Callable[[], torch.nn.Module],
    write: Callable[[dict[str, Any]], object],
    *,
    runs: int = 1,
    steps: int = 2,
    seconds: float = 380,
) -> dict[str, Any]:
    """Run the parts in the order of their worth, as long as there is time.

    Args:
        write: called with all that is known, after each part.
        seconds: no part is begun later than that.
    """
    begin = time.monotonic()
    result: dict[str, Any] = {"size": bench.settings.size, "kinds": {}, "exactness": {}, "left_out": {}}
    kinds, exact = result["kinds"], result["exactness"]

    def timing(name: str, **how: bool) -> Callable[[], object]:
        return lambda: kinds.update({name: time_changed(bench, steps=steps, **how)})

    def checking(name: str, *flags: object) -> Callable[[], object]:
        return lambda: exact.update({name: exactness(*flags, device=bench.device)})

    parts: dict[str, Callable[[], object]] = {
        "plain": lambda: kinds.update(time_plain(bench, runs=runs, steps=steps)),
        "decoding": lambda: result.update(decoding=time_decoding(bench, vae())),
        "exactness plain": checking("plain"),
        "compiled": timing("compiled", quantize=False, compile=True),
        "fp8": timing("fp8", quantize=True, compile=False),
        "exactness fp8": checking("fp8", "--quantize", "fp8"),
        "exactness compiled": checking("compiled", "--compile", bench.backend),
        "fp8 compiled": timing("fp8 compiled", quantize=True, compile=True),
    }
    for name, part in parts.items():
        if time.monotonic() - begin > seconds:
            result["left_out"][name] = f"no time: {seconds:.0f} s were over"
            continue
        try:
            part()
        except (InputError, RuntimeError, subprocess.CalledProcessError) as error:
            result["left_out"][name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        result["seconds"] = time.monotonic() - begin
        write(result)
    if "decoding" in result:
        decoding = result["decoding"]["tiles"]["seconds"]
        result["kinds"] = {name: with_sums(each, decoding=decoding) for name, each in kinds.items()}
    write(result)
    return result


def summarize(result: dict[str, Any]) -> str:
    """The tables, for people."""

    def number(value: float | None, digits: int = 1) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    height, width, num_frames = result["size"]
    lines = [
        f"{result['machine']['device_name']}, torch {result['versions']['torch']}, attention "
        f"{result['machine']['attention']}, {height} x {width} x {num_frames}, random weights, guided steps:",
        "",
        "| kind | s a step | to bare | s a prior of 10 | s a new prompt in 3 | peak VRAM, GiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, each in result["kinds"].items():
        cells = [
            number(each["seconds_per_step"], 2),
            number(each.get("ratio_to_bare"), 3),
            number(each.get("seconds_per_prior")),
            number(each.get("seconds_per_new_prompt")),
            number((each.get("peak") or {}).get("reserved_gib")),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, each in result.get("decoding", {}).items():
        lines.append(f"| decoding, {name} | {each['seconds']:.2f} s a clip | | | | |")
    lines += [
        "",
        "| embedded model in bfloat16, the prior's own prompt | clips | exact |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {name} | {each['clips']} | {each['exact']} |" for name, each in result["exactness"].items()]
    lines += ["", "Published by others for the same model and size, **not run by us**:", ""]
    lines += ["| what | published | where |", "| --- | --- | --- |"]
    lines += [f"| {' | '.join(anchor)} |" for anchor in ANCHORS]
    lines += ["", *(f"Left out: {name} ({why})." for name, why in result["left_out"].items())]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--runs", type=int, default=1, help="of bare and plain steps, in turn (default: 1)")
    parser.add_argument("--steps", type=int, default=2, help="guided steps in a run (default: 2)")
    parser.add_argument("--seconds", type=float, default=380, help="no part begins later (default: 380)")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "gpu.json")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("gpu.py: error: torch sees no CUDA GPU here; this benchmark needs one")
    about = {"machine": describe_machine("cuda"), "versions": installed_versions()}
    args.output.parent.mkdir(parents=True, exist_ok=True)

    def write(result: dict[str, Any]) -> None:
        write_json(args.output, about | result)
        args.output.with_suffix(".md").write_text(summarize(about | result), encoding="utf-8")

    bench = Bench(FULL_SIZE, SETTINGS, "cuda", "inductor")
    limits = {"runs": args.runs, "steps": args.steps, "seconds": args.seconds}
    result = measure(bench, WanVideoVAE, write, **limits)
    print(summarize(about | result))


if __name__ == "__main__":
    main()
