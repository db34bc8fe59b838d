"""What a sweep saves: 8 prompts x 3 start steps in one process against 24 separate calls, embedded model.

    python benchmarks/sweep_cost.py

Runs the command line as a user does, each side with its own copy of one prior that has met none of the
prompts, and checks that both sides end in the same latents and the same videos, byte for byte. Then the sweep
again into another folder, when every prompt is known, and into the same one, when every video is there. At
last a sweep that is killed at ten random moments and run to its end. Writes --output. Takes some six minutes
on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from step_skip.files.writing import write_json
from step_skip.models.machine import installed_versions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))


PROMPTS = (
    "she moves to the left",
    "she goes right",
    "she floats up",
    "she sinks",
    "she comes closer",
    "she backs away",
    "she speaks",
    "she falls asleep",
)
START_STEPS = (2, 4, 6)
DECIDING = ("latents_sha256", "video_sha256")


def start(script: str, *flags: object) -> subprocess.Popen:
    """Start one of the scripts."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def timed(script: str, *flags: object) -> tuple[Path, dict[str, float]]:
    """Run one of the scripts to its end: what it made, and its wall and CPU seconds, ffmpeg's included."""
    started, before = time.perf_counter(), os.times()
    process = start(script, *flags)
    out, err = process.communicate()
    if process.returncode:
        raise SystemExit(err)
    wall, after = time.perf_counter() - started, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Path(out.splitlines()[-1]), {"wall": wall, "cpu": cpu}


def read_results(paths: list[Path]) -> dict[tuple[str, int], dict[str, Any]]:
    """Results by prompt and start step."""
    reports = [json.loads(path.with_suffix(".json").read_text()) for path in paths]
    return {(report["prompt"], report["start_step"]): report for report in reports}


def same(one: dict, other: dict) -> bool:
    """Whether two sets of results are the same latents and the same files, bit for bit."""
    return one.keys() == other.keys() and all(
        one[key][name] == other[key][name] for key in one for name in DECIDING
    )


def loaded(results: dict) -> list[str]:
    """The components that were loaded for these results."""
    return sorted({name for report in results.values() for name in report["components_loaded"]})


def size(folder: Path) -> int:
    """Bytes below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def kill_and_finish(flags: list[object], folder: Path, *, kills: int, within: float) -> list[int]:
    """Kill a sweep at random moments, then run it to its end; how many videos were whole after each kill."""
    moments, whole = random.Random(0), []
    for _ in range(kills):
        process = start("infer_from_prior.py", *flags)
        time.sleep(moments.uniform(0, within))
        process.kill()
        process.communicate()
        whole.append(len(list(folder.glob("[!.]*.json"))))
    timed("infer_from_prior.py", *flags)
    return whole


def main() -> None:
    """Time both sides, compare them, and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", type=Path, default=ROOT / "data" / "tiny_wan_i2v" / "inputs" / "mila.png")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--start_steps", nargs="+", type=int, default=START_STEPS)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--output", type=Path, default=HERE / "out" / "sweep.json")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    made, prior_seconds = timed(
        "generate_prior.py", "--model", "tiny", "--image", args.image, "--output_dir", work, "--run_id", "one"
    )
    prior = {name: Path(shutil.copytree(made, work / name)) for name in ("sweep", "separate", "killed")}
    choices = ["--prompt", *args.prompts, "--start_step", *args.start_steps]

    def sweep(name: str, folder: Path) -> tuple[dict, dict[str, float]]:
        flags = ("--prior_dir", prior[name], *choices, "--output_dir", folder)
        _, seconds = timed("infer_from_prior.py", *flags)
        return read_results(sorted(folder.glob("*.mp4"))), seconds

    swept, sweep_seconds = sweep("sweep", work / "first")
    calls = []
    for prompt in args.prompts:
        for step in args.start_steps:
            flags = ("--prior_dir", prior["separate"], "--prompt", prompt, "--start_step", step)
            calls.append(timed("infer_from_prior.py", *flags))
    separate = read_results([path for path, _ in calls])
    separate_seconds = {name: sum(seconds[name] for _, seconds in calls) for name in ("wall", "cpu")}
    known, known_seconds = sweep("sweep", work / "known")
    _, done_seconds = sweep("sweep", work / "known")
    flags = ["--prior_dir", prior["killed"], *choices, "--output_dir", work / "killed_out"]
    whole = kill_and_finish(flags, work / "killed_out", kills=args.kills, within=sweep_seconds["wall"] / 2)
    result = {
        "videos": len(swept),
        "forwards": sum(report["forwards"] for report in swept.values()),
        "prior_seconds": prior_seconds,
        "sweep_seconds": sweep_seconds,
        "separate_seconds": separate_seconds,
        "ratio": {name: separate_seconds[name] / sweep_seconds[name] for name in ("wall", "cpu")},
        "same_latents_and_videos": same(swept, separate),
        "sweep_loaded": loaded(swept),
        "known_prompts_loaded": loaded(known),
        "known_prompts_seconds": known_seconds,
        "known_prompts_same": same(swept, known),
        "nothing_left_to_make_seconds": done_seconds,
        "whole_after_each_kill": whole,
        "killed_same": same(swept, read_results(sorted((work / "killed_out").glob("[!.]*.mp4")))),
        "sweep_bytes": size(work / "first"),
        "kept_prompts_bytes": size(prior["sweep"] / "contexts"),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": installed_versions(),
    }
    shutil.rmtree(work)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
