"""Measure the promise on the embedded model: is the new prompt obeyed, the identity kept, the time saved?

    python benchmarks/promise.py --identities 100
    python benchmarks/promise.py --report_only

Every case is an identity the model has not seen, a motion its prior was made with and another one that
is asked for; every method (promise_methods.py) makes that second clip its own way, one clip at a time, in
float32. The VAE decodes in bfloat16 and untiled, four times faster on this CPU, for all of them alike.
Writes clips.csv (one line a clip), the tables and a plot to --output; clips already in
clips.csv are not made again, so that an interrupted run goes on where it stopped. Takes about a minute and a
half an identity and seed on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "tiny_wan_i2v")]

import world
from evaluate import psnr
from promise_methods import PRIORS, STEPS, Case, Method, as_array, methods
from promise_report import NUMBERS

from step_skip.models.families import latents_shape
from step_skip.models.loading import load_pipeline
from step_skip.models.machine import installed_versions
from step_skip.models.weights import LoadOptions, fingerprint_files, model_defaults, weight_files
from step_skip.pipeline.settings import RunSettings

Job = tuple[int, int, float]  # index, seed, cfg_scale
FIRST_IDENTITY = 2_000_000  # a stream of identities of its own, neither the training's nor evaluate.py's
COLUMNS = (
    "index",
    "seed",
    "cfg_scale",
    "old_motion",
    "new_motion",
    "method",
    "prior",
    "forwards",
    "block_evaluations",
    "shown",
    *NUMBERS,
)


# --- cases --------------------------------------------------------------------------------------------------


def make_case(pipe, defaults, index: int, seed: int, cfg_scale: float) -> Case:
    """The index-th unseen identity, its two motions and wordings, and the seed-th noise."""
    from PIL import Image

    from step_skip.pipeline.run import encode_image, encode_prompt

    rng = np.random.default_rng([FIRST_IDENTITY, index])
    identity = world.sample_identity(rng)
    old, new = (str(motion) for motion in rng.choice(world.MOTIONS, 2, replace=False))
    texts = {"old": world.sample_prompt(rng, old), "new": world.sample_prompt(rng, new)}
    texts |= {"empty": "", "still": "the character stays still"}
    contexts = {name: encode_prompt(pipe, text) for name, text in texts.items()}
    settings = RunSettings(
        num_inference_steps=STEPS,
        denoising_strength=1.0,
        sigma_shift=defaults.sigma_shift,
        cfg_scale=cfg_scale,
        height=defaults.height,
        width=defaults.width,
        num_frames=defaults.num_frames,
        tiled=False,
    )
    shape = latents_shape(height=settings.height, width=settings.width, num_frames=settings.num_frames)
    noise = pipe.generate_noise(shape, seed=seed, rand_device="cpu")
    image = encode_image(pipe, Image.fromarray(world.first_frame(identity)), num_frames=settings.num_frames)
    return Case(index, seed, pipe, settings, identity, old, new, contexts, image, noise)


def measure_case(
    pipe, defaults, index: int, seed: int, cfg_scale: float, methods: list[Method]
) -> Iterator[dict]:
    """One line for every method."""
    case = make_case(pipe, defaults, index, seed, cfg_scale)
    kinds = {method.prior for method in methods} & PRIORS.keys()
    priors = {kind: PRIORS[kind](case) for kind in sorted(kinds)}
    full = None
    for method in methods:
        result = method.run(case, priors.get(method.prior))
        shown = look(case, result)
        full = shown if full is None else full  # the first method is the full run
        yield rate(case, method, result, shown, full)


def look(case: Case, result) -> tuple[np.ndarray, world.Measurement]:
    """The frames of a clip, and what they show."""
    frames = as_array(result.frames)
    return frames, world.measure(frames, case.identity)


def rate(case: Case, method: Method, result, shown: tuple, full: tuple) -> dict:
    """A method's line: what it cost and what came out, as `look` saw it, against the full run likewise."""
    (frames, found), (full_frames, full_found) = shown, full
    return {
        "index": case.index,
        "seed": case.seed,
        "cfg_scale": case.settings.cfg_scale,
        "old_motion": case.old_motion,
        "new_motion": case.new_motion,
        "method": method.name,
        "prior": method.prior,
        "forwards": result.forwards,
        "block_evaluations": result.block_evaluations,
        "shown": found.motion,
        "obeyed": int(found.motion == case.new_motion),
        "old_kept": int(found.motion == case.old_motion),
        "identity_error": round(found.identity_error, 4),
        "sharpness": round(found.sharpness, 4),
        "bloom_error": round(found.bloom_error, 4),
        "decided": round(found.decided, 4),
        "psnr": round(psnr(frames, full_frames), 3),
        "ssim": round(ssim(frames, full_frames), 5),
        "shared_with_full": round(world.agreement(found, full_found), 4),
        "denoise_seconds": round(result.seconds.get("denoise", float("nan")), 3),
    }


class FastDecoder:
    """A VAE that decodes in bfloat16, four times faster on CPUs with AMX; encoding stays in float32.

    Every method is decoded alike, the full run it is compared with too.
    """

    def __init__(self, vae):
        import torch

        self.vae, self.model, self.upsampling_factor = vae, vae.model, vae.upsampling_factor
        self.fast = copy.deepcopy(vae).to(torch.bfloat16)
        self.encode = vae.encode

    def decode(self, latents, **kwargs):
        """As WanVideoVAE.decode."""
        return self.fast.decode(latents.bfloat16(), **kwargs).float()


_worker: tuple = ()  # pipeline and defaults of this process


def start_worker(threads: int) -> None:
    """Load the model once in each process."""
    global _worker
    import torch

    torch.set_num_threads(threads)
    options = LoadOptions("tiny", "cpu", "float32")
    pipe = load_pipeline(options, weight_files(options))
    vae = pipe.vae
    del pipe.vae  # a module's place takes no other object
    pipe.vae = FastDecoder(vae)
    _worker = (pipe, model_defaults("tiny"))


def work(job: Job) -> list[dict]:
    """All lines of one case."""
    return list(measure_case(*_worker, *job, list(methods())))


def ssim(frames: np.ndarray, full: np.ndarray) -> float:
    """Structural similarity, mean over the frames. uint8 [T, H, W, 3], both"""
    from skimage.metrics import structural_similarity

    pairs = zip(frames, full, strict=True)
    return float(np.mean([structural_similarity(a, b, channel_axis=2) for a, b in pairs]))


def run_cases(
    jobs: list[Job],
    path: Path,
    *,
    workers: int,
    work: Callable[[Job], list[dict]] = work,
    columns: Sequence[str] = COLUMNS,
) -> None:
    """Do the cases clips.csv doesn't hold yet."""
    from tqdm import tqdm

    rows = list(csv.DictReader(path.open())) if path.exists() else []
    done = {(int(row["index"]), int(row["seed"]), float(row["cfg_scale"])) for row in rows}
    jobs = [job for job in jobs if job[:3] not in done]
    if not jobs:
        return
    os.environ["TQDM_DISABLE"] = "1"  # in the workers: only the bar over the cases is of interest
    with path.open("a", newline="") as out:
        writer = csv.DictWriter(out, columns)
        if not rows:
            writer.writeheader()
        spawn = multiprocessing.get_context("spawn")
        with spawn.Pool(workers, start_worker, (max(1, multiprocessing.cpu_count() // workers),)) as pool:
            for lines in tqdm(pool.imap(work, jobs), total=len(jobs), desc="cases", disable=False):
                writer.writerows(lines)
                out.flush()


def check_same_setup(path: Path, methods: list[Method]) -> None:
    """Stop before clips of other weights or other methods are added to those that are there."""

    options = LoadOptions("tiny", "cpu", "float32")
    setup = {
        "weights": fingerprint_files(weight_files(options)),
        "methods": [f"{method.name}, {method.prior}: {named(method.run.keywords)}" for method in methods],
        "decoded_in": "bfloat16",
        "versions": installed_versions(),
    }
    text = json.dumps(setup, indent=2)
    if path.exists() and path.read_text() != text:
        program = Path(sys.argv[0]).name
        sys.exit(f"{program}: error: {path} is of other weights, methods or versions; use another --output")
    path.write_text(text)


def named(keywords: dict) -> dict:
    """Functions by their names: their addresses are other ones in every process."""
    return {key: getattr(value, "__name__", value) for key, value in keywords.items()}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--identities", type=int, default=100, help="unseen identities (default: 100)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="noises per identity (default: 0)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[2, 5], help="cfg_scale (default: 2 5)")
    parser.add_argument("--output", type=Path, default=HERE / "out" / "promise")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--report_only", action="store_true", help="only redo summary and plots")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the cases that are missing, then report."""
    import promise_report

    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    clips = args.output / "clips.csv"
    if not args.report_only:
        check_same_setup(args.output / "setup.json", list(methods()))
        # the seed goes with the identity, so that no two cases share their noise
        jobs = [
            (index, 1000 * seed + index, cfg_scale)
            for seed in args.seeds
            for index in range(args.identities)
            for cfg_scale in args.guidance
        ]
        run_cases(jobs, clips, workers=args.workers)
    print(promise_report.write(clips, args.output))


if __name__ == "__main__":
    main()
