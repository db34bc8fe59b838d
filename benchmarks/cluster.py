"""A sweep on a Ray cluster of this machine: clips per minute by workers, and what kills cost.

    python benchmarks/cluster.py --output benchmarks/results/cluster.json

Embedded model, one thread for each worker; clips per minute are counted from the first clip on, so without
the seconds in which Ray and the workers start. Then workers are killed at random moments, and nothing may be
lost or come out other than in one process.
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

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from step_skip.files import write_json
from step_skip.loading import installed_versions

IMAGE = ROOT / "data" / "tiny_wan_i2v" / "inputs" / "mila.png"
PROMPTS = 12


def start(script: str, *flags: object) -> subprocess.Popen:
    """Start one of the scripts with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def end(process: subprocess.Popen) -> str:
    """Wait for a script, and return the last line it printed."""
    out, err = process.communicate()
    if process.returncode:
        raise SystemExit(err)
    return out.splitlines()[-1]


def digests(folder: Path) -> dict[str, list[str]]:
    """Latents and video of every clip, by name."""
    reports = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return {name: [each["latents_sha256"], each["video_sha256"]] for name, each in reports.items()}


def rate(folder: Path) -> float:
    """Clips per minute from the first to the last."""
    times = sorted(path.stat().st_mtime for path in folder.glob("*.json"))
    return round(60 * (len(times) - 1) / (times[-1] - times[0]), 1)


def kill_workers(process: subprocess.Popen, *, kills: int, every: float) -> int:
    """Kill a worker that makes a clip at random moments while a sweep runs; how many were killed."""
    moments, killed = random.Random(0), 0
    while process.poll() is None and killed < kills:
        time.sleep(moments.uniform(0.2, every))
        found = [
            each
            for each in psutil.process_iter(["cmdline"])
            if (each.info["cmdline"] or [""])[0].startswith("ray::Worker.make")
        ]
        if found:
            moments.choice(found).kill()
            killed += 1
    return killed


def main() -> None:
    """Make the same sweep in each way, compare, and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--output", type=Path, default=HERE / "out" / "cluster.json")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    made = ("--model", "tiny", "--prompt", "she stays still", "--output_dir", work / "priors")
    prior = end(start("generate_prior.py", "--image", IMAGE, *made))
    prompts = [f"she moves {number}" for number in range(args.prompts)]
    sweep = ("--prior_dir", prior, "--prompt", *prompts, "--num_steps", 4)
    end(start("infer_from_prior.py", *sweep, "--output_dir", work / "here"))
    expected = digests(work / "here")
    result: dict[str, Any] = {
        "clips": len(expected),
        "clips_per_minute": {"one process": rate(work / "here")},
    }
    for workers in args.workers:
        folder = work / f"workers_{workers}"
        end(
            start(
                "infer_from_prior.py", *sweep, "--output_dir", folder, "--ray", "local", "--workers", workers
            )
        )
        result["clips_per_minute"][f"{workers} workers"] = rate(folder)
        result.setdefault("same", []).append(digests(folder) == expected)
    if args.kills:
        flags = ("--output_dir", work / "killed", "--ray", "local", "--workers", max(args.workers))
        process = start("infer_from_prior.py", *sweep, *flags)
        killed = kill_workers(process, kills=args.kills, every=8)
        _, err = process.communicate()
        again = err.count("failed:")  # a clip over which three workers were killed is given up
        if process.returncode:
            end(start("infer_from_prior.py", *sweep, *flags))
        result["kills"] = {
            "workers_killed": killed,
            "told_as_lost": err.count("a worker was lost"),
            "clips_given_up_and_made_by_the_same_command": again,
            "same": digests(work / "killed") == expected,
            "clips": len(digests(work / "killed")),
        }
    result |= {"cores": os.cpu_count(), "load": os.getloadavg()[0], "versions": installed_versions()}
    shutil.rmtree(work)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
