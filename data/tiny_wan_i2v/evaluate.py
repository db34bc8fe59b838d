"""What the embedded model can do, on identities it was not trained on, measured by world.py.

    python data/tiny_wan_i2v/evaluate.py --workers 2

Every clip is made by the unmodified WanVideoPipeline, one at a time, as a user makes it. Writes clips.csv,
the figures and the pictures to the results folder; clips already in clips.csv are not made again.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import figures
import numpy as np
import world
from figures import MEASURES, NUMBERS, STEPS

from step_skip.models.embedded import load_tiny_modules, load_tiny_tokenizer
from step_skip.models.weights import read_tiny_config

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))


COLUMNS = ("experiment", "index", "motion", "steps", "seed", "prompt", "shown", *NUMBERS, "seconds")
INPUTS = {"mila": 201, "nora": 214, "ruby": 217, "theo": 226}  # name -> identity, none of those measured
FIRST_IDENTITY = 1_000_000  # far from the stream of numbers that training draws from


def identity_of(index: int) -> world.Identity:
    """The index-th identity of the evaluation. Training draws from another stream."""
    return world.sample_identity(np.random.default_rng([FIRST_IDENTITY, index]))


def prompt_of(index: int, motion: str, *, held_out: bool = False) -> str:
    """The wording that the index-th identity is asked with."""
    return world.sample_prompt(np.random.default_rng([FIRST_IDENTITY, index, 1]), motion, held_out=held_out)


def make_pipeline(folder: Path, dtype: str = "float32"):
    """An unmodified WanVideoPipeline around the trained modules."""
    import torch
    from diffsynth.pipelines.wan_video import WanVideoPipeline

    pipe = WanVideoPipeline(device="cpu", torch_dtype=getattr(torch, dtype))
    for name, module in load_tiny_modules(folder).items():
        setattr(pipe, name, module.to(pipe.torch_dtype))
    pipe.tokenizer = load_tiny_tokenizer(folder)
    return pipe


def generate(
    pipe, defaults: dict, image: np.ndarray, prompt: str, *, seed: int, steps: int = 10
) -> np.ndarray:
    """One clip at the defaults of config.json. uint8 [T, H, W, 3]"""
    from PIL import Image

    settings = {key: value for key, value in defaults.items() if key != "fps"}
    frames = pipe(
        prompt=prompt,
        input_image=Image.fromarray(image),
        seed=seed,
        num_inference_steps=steps,
        tiled=False,
        progress_bar_cmd=lambda steps: steps,
        **settings,
    )
    return np.stack([np.asarray(frame) for frame in frames])


def reconstruct(pipe, clip: np.ndarray) -> np.ndarray:
    """A clip through the VAE and back: the best that any run can look. uint8 [T, H, W, 3]"""
    import torch

    video = torch.from_numpy(clip).permute(3, 0, 1, 2).to(pipe.torch_dtype) / 127.5 - 1
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode([video], device="cpu"), device="cpu")[0]
    return world.to_uint8(decoded.float().permute(1, 2, 3, 0).numpy() / 2 + 0.5)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two clips in dB."""
    error = np.mean((first.astype(np.float64) - second) ** 2)
    return float(99.0 if error == 0 else 10 * np.log10(255**2 / error))


def row_of(job: dict, clip: np.ndarray, identity: world.Identity, **more) -> dict:
    """One line of clips.csv."""
    found = world.measure(clip, identity)
    row = dict.fromkeys(COLUMNS, "") | job | more
    row |= {name: round(getattr(found, name), 5) for name in MEASURES}
    return row | {"shown": found.motion, "obeyed": int(found.motion == job["motion"])}


# experiments: one job is one identity


def true_clip(pipe, defaults: dict, index: int) -> Iterator[dict]:
    """The measures on a true clip and on its reconstruction by the VAE."""
    identity, motion = identity_of(index), world.MOTIONS[index % len(world.MOTIONS)]
    clip = world.render(
        identity, motion, world.sample_open_part(np.random.default_rng([FIRST_IDENTITY, index, 2]))
    )
    yield row_of({"experiment": "true", "index": index, "motion": motion}, clip, identity)
    copy = reconstruct(pipe, clip)
    yield row_of(
        {"experiment": "vae", "index": index, "motion": motion},
        copy,
        identity,
        psnr=round(psnr(clip, copy), 3),
    )


def default_run(pipe, defaults: dict, index: int, *, held_out: bool) -> Iterator[dict]:
    """A run at the defaults, asked in a trained wording or in one that was held out."""
    identity, motion = identity_of(index), world.MOTIONS[index % len(world.MOTIONS)]
    prompt = prompt_of(index, motion, held_out=held_out)
    began = time.perf_counter()
    clip = generate(pipe, defaults, world.first_frame(identity), prompt, seed=index)
    seconds = round(time.perf_counter() - began, 3)
    name = "held_out" if held_out else "default"
    job = {"experiment": name, "index": index, "motion": motion, "prompt": prompt, "steps": 10, "seed": index}
    yield row_of(job, clip, identity, seconds=seconds)


def step_curve(pipe, defaults: dict, index: int) -> Iterator[dict]:
    """The same noise at every number of steps; psnr is against the run with the most."""
    identity, motion = identity_of(index), world.MOTIONS[index % len(world.MOTIONS)]
    prompt, image = prompt_of(index, motion), world.first_frame(identity)
    clips, seconds = {}, {}
    for steps in STEPS:
        began = time.perf_counter()
        clips[steps] = generate(pipe, defaults, image, prompt, seed=index, steps=steps)
        seconds[steps] = round(time.perf_counter() - began, 3)
    for steps in STEPS:
        job = {
            "experiment": "steps",
            "index": index,
            "motion": motion,
            "prompt": prompt,
            "steps": steps,
            "seed": index,
        }
        near = round(psnr(clips[steps], clips[STEPS[-1]]), 3)
        yield row_of(job, clips[steps], identity, psnr=near, seconds=seconds[steps])


def two_seeds(pipe, defaults: dict, index: int) -> Iterator[dict]:
    """One prompt under two seeds and under the first again; psnr is against the first."""
    identity, motion = identity_of(index), world.MOTIONS[index % len(world.MOTIONS)]
    prompt, image = prompt_of(index, motion), world.first_frame(identity)
    first = generate(pipe, defaults, image, prompt, seed=index)
    for name, seed in (("other_seed", index + 1), ("same_seed", index)):
        clip = generate(pipe, defaults, image, prompt, seed=seed)
        job = {
            "experiment": name,
            "index": index,
            "motion": motion,
            "prompt": prompt,
            "steps": 10,
            "seed": seed,
        }
        agree = round(world.agreement(world.measure(first, identity), world.measure(clip, identity)), 5)
        yield row_of(job, clip, identity, psnr=round(psnr(first, clip), 3), agreement=agree)


EXPERIMENTS: dict[str, Callable] = {
    "true": true_clip,
    "default": lambda *args: default_run(*args, held_out=False),
    "held_out": lambda *args: default_run(*args, held_out=True),
    "steps": step_curve,
    "other_seed": two_seeds,
}

_pipe = None  # of a worker process


def _start(folder: Path, threads: int) -> None:
    global _pipe
    import torch

    torch.set_num_threads(threads)
    _pipe = make_pipeline(folder), read_tiny_config(folder)["defaults"]


def _work(job: tuple[str, int]) -> list[dict]:
    return list(EXPERIMENTS[job[0]](*_pipe, job[1]))


def run_jobs(jobs: list[tuple[str, int]], path: Path, *, folder: Path, workers: int) -> list[dict]:
    """Do what clips.csv does not hold yet, one identity at a time, and return all its lines."""
    import multiprocessing

    from tqdm import tqdm

    rows = list(csv.DictReader(path.open())) if path.exists() else []
    done = {(row["experiment"], int(row["index"])) for row in rows}
    jobs = [job for job in jobs if job not in done]
    with path.open("a", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS)
        if not rows:
            writer.writeheader()
        if jobs:
            spawn = multiprocessing.get_context("spawn")
            with spawn.Pool(workers, _start, (folder, max(1, 2 // workers))) as pool:
                for made in tqdm(pool.imap(_work, jobs), total=len(jobs), desc="identities", file=sys.stderr):
                    writer.writerows(made)
                    out.flush()
    return list(csv.DictReader(path.open()))


# speed and pictures


def speed(folder: Path) -> dict[str, float]:
    """Seconds to load, and of the second full and resumed run of a process, two threads."""
    import torch
    from PIL import Image

    from step_skip.pipeline.run import run_from, run_full
    from step_skip.pipeline.settings import RunSettings

    torch.set_num_threads(2)
    began = time.perf_counter()
    pipe, defaults = make_pipeline(folder), read_tiny_config(folder)["defaults"]
    times = {"load": time.perf_counter() - began}
    prompts = {"prompt": prompt_of(0, "left"), "negative_prompt": defaults["negative_prompt"]}
    sizes = {name: defaults[name] for name in ("cfg_scale", "sigma_shift", "height", "width", "num_frames")}
    settings = RunSettings(num_inference_steps=10, denoising_strength=1.0, seed=0, tiled=False, **sizes)
    image, kept, steps = Image.fromarray(world.first_frame(identity_of(0))), [], []
    for _ in range(2):
        began = time.perf_counter()
        run_full(
            pipe,
            settings,
            **prompts,
            input_image=image,
            on_start=lambda latents, conditioning: kept.append(conditioning),
            on_step=steps.append,
        )
        times["full_run"] = time.perf_counter() - began
        began = time.perf_counter()
        run_from(pipe, settings, start_step=6, latents=steps[6].latents, conditioning=kept[0])
        times["resumed_run"] = time.perf_counter() - began
    return {name: round(seconds, 2) for name, seconds in times.items()}


def strip(frames: np.ndarray, *, count: int = 5, zoom: int = 1) -> np.ndarray:
    """Some frames of a clip side by side. uint8 [H, W, 3]"""
    chosen = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    return np.concatenate(list(chosen), 1).repeat(zoom, 0).repeat(zoom, 1)


def draw_strips(folder: Path, results: Path) -> None:
    """Every motion for one identity, and one prompt at every number of steps."""
    from PIL import Image

    pipe, defaults = make_pipeline(folder), read_tiny_config(folder)["defaults"]
    image = world.first_frame(identity_of(INPUTS["mila"]))
    rows = [
        strip(generate(pipe, defaults, image, f"she {world.WORDINGS[motion][0][0]}", seed=1))
        for motion in world.MOTIONS
    ]
    half = len(rows) // 2
    Image.fromarray(np.concatenate([np.concatenate(rows[:half]), np.concatenate(rows[half:])], 1)).save(
        results / "motions.png"
    )
    lasts = [
        generate(pipe, defaults, image, "she moves to the left", seed=1, steps=steps)[-1] for steps in STEPS
    ]
    Image.fromarray(np.concatenate(lasts, 1).repeat(2, 0).repeat(2, 1)).save(results / "steps_strip.png")


def draw_inputs(folder: Path) -> None:
    """A few first frames to try the tool with."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for name, index in INPUTS.items():
        Image.fromarray(world.first_frame(identity_of(index))).save(folder / f"{name}.png")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=HERE, help="config.json, tokenizer and weights")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where tables and pictures go")
    parser.add_argument("--pairs", type=int, default=200, help="identities for the runs at the defaults")
    parser.add_argument("--held_out", type=int, default=100, help="identities asked in held-out wordings")
    parser.add_argument("--true", type=int, default=100, help="true clips, measured and through the VAE")
    parser.add_argument("--curve", type=int, default=24, help="identities for the curve over steps")
    parser.add_argument("--seeds", type=int, default=10, help="identities for the comparison of seeds")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.results.mkdir(parents=True, exist_ok=True)
    counts = {
        "default": args.pairs,
        "steps": args.curve,
        "held_out": args.held_out,
        "true": args.true,
        "other_seed": args.seeds,
    }
    jobs = [(name, index) for name, count in counts.items() for index in range(count)]
    rows = run_jobs(jobs, args.results / "clips.csv", folder=args.folder, workers=args.workers)
    draw_strips(args.folder, args.results)
    draw_inputs(args.folder / "inputs")
    print(figures.write(rows, speed(args.folder), args.results))


if __name__ == "__main__":
    main()
