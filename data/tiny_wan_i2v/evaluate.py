"""What the embedded model can do, on identities it was not trained on, measured by world.py.

    python data/tiny_wan_i2v/evaluate.py --workers 2

Every clip is made by the unmodified WanVideoPipeline, one at a time, as a user makes it. Writes clips.csv,
summary.json and the pictures to the results folder; clips already in clips.csv are not made again.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import world

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import tiny_model  # noqa: E402

STEPS = (1, 2, 3, 4, 6, 8, 10, 20)
NUMBERS = (
    "obeyed",
    "identity_error",
    "colour_error",
    "place_error",
    "sharpness",
    "bloom_error",
    "decided",
    "psnr",
)
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
    for name, module in tiny_model.load(folder).items():
        setattr(pipe, name, module.to(pipe.torch_dtype))
    pipe.tokenizer = tiny_model.tokenizer(folder)
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
    row = {"steps": "", "seed": "", "prompt": "", "psnr": "", "seconds": ""} | job | more
    row |= {name: round(getattr(found, name), 5) for name in NUMBERS if hasattr(found, name)}
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
        agree = world.agreement(world.measure(first, identity), world.measure(clip, identity))
        yield row_of(job, clip, identity, psnr=round(psnr(first, clip), 3)) | {"decided": round(agree, 5)}


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
    _pipe = make_pipeline(folder), tiny_model.read_config(folder)["defaults"]


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


# summary


def bootstrap(values: np.ndarray, *, seed: int = 0, draws: int = 2000) -> list[float]:
    """Mean and the 95% percentile interval over identities. -> [mean, low, high]"""
    values = np.asarray(values, float)
    means = values[np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))].mean(1)
    return [round(float(v), 5) for v in (values.mean(), *np.percentile(means, (2.5, 97.5)))]


def summarise(rows: list[dict]) -> dict:
    """Mean and interval of every number, by experiment and steps, and 10 steps against 3."""
    table, groups = {}, {}
    for row in rows:
        groups.setdefault((row["experiment"], row["steps"]), []).append(row)
    for (experiment, steps), group in groups.items():
        name = f"{experiment}_{steps}" if experiment == "steps" else experiment
        table[name] = {"clips": len(group)}
        for number in NUMBERS:
            values = [float(row[number]) for row in group if row[number] not in ("", "nan")]
            if values:
                table[name][number] = bootstrap(values)
        table[name]["obeyed_by_motion"] = {
            motion: round(float(np.mean([int(row["obeyed"]) for row in group if row["motion"] == motion])), 3)
            for motion in world.MOTIONS
            if any(row["motion"] == motion for row in group)
        }
    table["ten_over_three"] = paired(rows, 10, 3)
    table["twenty_over_ten"] = paired(rows, 20, 10)
    return table


def paired(rows: list[dict], more: int, fewer: int) -> dict:
    """Mean difference and interval of every number between two numbers of steps from the same noise."""
    by_steps = {
        steps: {
            row["index"]: row for row in rows if row["experiment"] == "steps" and row["steps"] == str(steps)
        }
        for steps in (more, fewer)
    }
    both = sorted(by_steps[more].keys() & by_steps[fewer].keys())
    return {
        number: bootstrap(
            [float(by_steps[more][i][number]) - float(by_steps[fewer][i][number]) for i in both]
        )
        for number in NUMBERS
        if both
    }


def plot_steps(summary: dict, path: Path) -> None:
    """Quality over steps, the VAE's reconstruction of true clips as the ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {
        "bloom_error": "error of the wall's pattern (lower is better)",
        "decided": "share of tiles decided",
        "identity_error": "identity error, 8-bit levels (lower is better)",
        "psnr": f"PSNR to {STEPS[-1]} steps, dB",
    }
    figure, axes = pyplot.subplots(1, len(labels), figsize=(4 * len(labels), 3.2), layout="constrained")
    for axis, (number, label) in zip(axes, labels.items(), strict=True):
        shown = [steps for steps in STEPS if not (number == "psnr" and steps == STEPS[-1])]
        mean, low, high = np.array([summary[f"steps_{steps}"][number] for steps in shown]).T
        axis.fill_between(shown, low, high, alpha=0.25, linewidth=0)
        axis.plot(shown, mean, "o-")
        if number != "psnr":
            axis.axhline(summary["vae"][number][0], color="grey", linestyle="--", label="VAE of true clips")
            axis.legend(frameon=False)
        axis.set(xscale="log", xlabel="steps from noise", title=label)
        axis.set_xticks(shown, [str(steps) for steps in shown])
        axis.minorticks_off()
    figure.savefig(path, dpi=110)


def speed(folder: Path) -> dict:
    """Seconds to load and to make one clip in a fresh process' first and second run, two threads."""
    import torch

    torch.set_num_threads(2)
    began = time.perf_counter()
    pipe, defaults = make_pipeline(folder), tiny_model.read_config(folder)["defaults"]
    times = {"load": time.perf_counter() - began}
    for name in ("first_run", "second_run"):
        began = time.perf_counter()
        generate(pipe, defaults, world.first_frame(identity_of(0)), prompt_of(0, "left"), seed=0)
        times[name] = time.perf_counter() - began
    return {name: round(seconds, 2) for name, seconds in times.items()}


def strip(frames: np.ndarray, *, count: int = 5, zoom: int = 1) -> np.ndarray:
    """Some frames of a clip side by side. uint8 [H, W, 3]"""
    chosen = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    return np.concatenate(list(chosen), 1).repeat(zoom, 0).repeat(zoom, 1)


def draw_strips(folder: Path, results: Path) -> None:
    """Every motion for one identity, and one prompt at every number of steps."""
    from PIL import Image

    pipe, defaults = make_pipeline(folder), tiny_model.read_config(folder)["defaults"]
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
    summary = summarise(rows) | {"seconds": speed(args.folder)}
    (args.results / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot_steps(summary, args.results / "steps.png")
    draw_strips(args.folder, args.results)
    draw_inputs(args.folder / "inputs")
    print(args.results / "summary.json")


if __name__ == "__main__":
    main()
