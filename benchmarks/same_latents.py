"""Whether a change of the code changed a bit: fixed command lines of both scripts, and what they end in.

    python benchmarks/same_latents.py

Runs them as a user does, on the embedded model and a CPU, and compares SHA-256 with those recorded in
results/same_latents.json: of the latents of every video and every prior, and of each prior's step files.
Exits 1 and names each that differs, each command line that failed, and each video of a prior's own prompt
that isn't the prior's own. With other versions or on another kind of CPU the last bits are others; there,
record the old code's before comparing the new one's:

    python benchmarks/same_latents.py --scripts ../old --recorded /tmp/old.json --write
    python benchmarks/same_latents.py --recorded /tmp/old.json

Takes three minutes on 2 CPU cores, two command lines at a time, each in one thread. It imports nothing of
the project, so it runs beside any layout of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
METADATA_FILE, LINES_FILE = "run_metadata.json", "lines.txt"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}

FACES = "data/tiny_wan_i2v/inputs"
PLACES = {  # what {...} in a command line stands for; any other is the prior of that run_id
    **{face: f"{FACES}/{face}.png" for face in ("mila", "nora", "ruby")},
    "lora": "data/tiny_wan_i2v/distilled_lora.safetensors",
}
STILL = "{mila} --prompt 'she stays still'"
PRIORS = {  # by run_id: the image and what comes after it
    "neutral": "{mila}",
    "still": STILL,
    "four": STILL + " --num_inference_steps 4",
    "many": STILL + " --num_inference_steps 25",
    "unguided": STILL + " --cfg_scale 1",
    "shifted": STILL + " --sigma_shift 3",
    "half": STILL + " --dtype bfloat16",
    "cached": STILL + " --skip_cache 2",
    "distilled": STILL + " --lora {lora} --cfg_scale 1 --num_inference_steps 4",
    "seeded": STILL + " --seed 3",
    "stopped": STILL + " --stop_after 3",
    "speaks closer": "{nora} {ruby} --prompt 'she speaks' 'she comes closer'",
}
VIDEOS = {  # by name: the priors and what comes after them
    "own prompt": "{still}",
    "own prompts": "{neutral} {four} {many} {unguided} {shifted} {seeded}",
    "new prompt": "{still} --prompt 'she moves to the left'",
    "new prompts": "{neutral} {four} {many} {shifted} --prompt 'she comes closer'",
    "own and new, resumed": "{still} --prompt 'she stays still' 'she speaks' --start_step 0 6 9",
    "automatic": "{still} --prompt 'she speaks' --start_step auto",
    "fewer after": "{still} --prompt 'she speaks' --start_step 6 --num_steps_after 2",
    "of a draft": "{stopped} --prompt 'she speaks' --start_step 2",
    "steps": "{still} --prompt 'she moves to the left' --steps 0 4 8",
    "sigmas": "{still} --prompt 'she moves to the left' --sigmas 0.9375 0.8333 0.625",
    "negative prompt": "{still} --prompt 'she moves to the left' --negative_prompt 'she stays still'",
    "guidance by step": "{still} --prompt 'she moves to the left' --cfg_scale 5 5 1",
    "cached, own and new": "{cached} --prompt 'she stays still' 'she speaks' --start_step 3 --skip_cache 2",
    "half, own and new": "{half} --prompt 'she stays still' 'she speaks'",
    "distilled, own and new": "{distilled} --prompt 'she stays still' 'she speaks'",
    "distilled, no LoRA": "{distilled} --prompt 'she speaks' --lora",
    "LoRA on sigmas": "{still} --prompt 'she speaks' --lora {lora} --cfg_scale 1 --sigmas 0.9375 0.625",
    "sweep": "{speaks} {closer} --prompt 'she moves to the left' 'she falls asleep' --start_step 2 6",
    "lines": "{still} --prompts_file {lines}",
}
LINES = (  # of the --prompts_file
    '{"prompt": "she moves to the left", "num_steps": 2}',
    '{"prompt": "she moves to the left", "num_steps": 4}',
    '{"prompt": "she moves to the left", "cfg_scale": 1}',
    '{"prompt": "she moves to the left", "negative_prompt": "she stays still"}',
    '{"prompt": "she moves to the left", "negative_prompt": "she speaks", "start_step": "5-6"}',
    '{"prompt": "she speaks", "steps": [0, 4, 8], "cfg_scale": [5, 5, 1]}',
)
FIRST = {
    name: f"generate_prior.py --model tiny --image {flags} --run_id {name} --output_dir {{folder}}"
    for name, flags in PRIORS.items()
}
SECOND = {  # these have priors
    "stopped, finished": "generate_prior.py --resume {stopped}",
    "of a video": f"generate_prior.py --model tiny --image {STILL} --run_id video --output_dir {{folder}} "
    "--input_video {still}/output_full.mp4 --denoising_strength 0.7",
    **{f"video: {name}": f"infer_from_prior.py --prior_dir {flags}" for name, flags in VIDEOS.items()},
}
CHOICES = ("start_step", "steps_run", "sigmas", "cfg_scale", "negative_prompt")  # tell a sweep's videos apart
Digests = dict[str, dict[str, str]]  # by command line's name and what they are of


def make(line: str, scripts: Path, priors: Path, folder: Path) -> list[Path]:
    """Run a command line on copies of its priors; what it made.

    Raises:
        RuntimeError: it failed, with its last words.
    """
    places = PLACES | {"folder": str(folder), "lines": str(priors / LINES_FILE)}
    for name in set(re.findall(r"{(\w+)}", line)) - places.keys():
        places[name] = str(shutil.copytree(priors / f"run_{name}", folder / f"run_{name}"))
    command = [sys.executable, *(word.format_map(places) for word in shlex.split(line))]
    environment = os.environ | ENVIRONMENT
    done = subprocess.run(command, cwd=scripts, env=environment, capture_output=True, text=True)
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["nothing on stderr"]
        raise RuntimeError(f"exit code {done.returncode}, {words[-1]}")
    return [Path(path) for path in done.stdout.splitlines()]


def read_made(path: Path) -> Iterator[tuple[str, str]]:
    """Digests of a prior, a video or a sweep, each with what it is of."""
    if (path / METADATA_FILE).exists():
        yield from read_prior(path)
    else:
        reports = sorted(path.glob("*.json")) if path.is_dir() else [path.with_suffix(".json")]
        yield from map(read_video, reports)


def read_prior(folder: Path) -> Iterator[tuple[str, str]]:
    """Digests of a prior's step files, and of its last latents where it isn't a draft."""
    metadata = read_json(folder / METADATA_FILE)
    digests = {name: digest for name, digest in metadata["files"].items() if name.startswith("step_")}
    if metadata["status"] == "complete":
        digests["latents"] = metadata["latents_sha256"]
    for name, digest in digests.items():
        yield f"{metadata['run_id']}, {name}", digest


def read_video(path: Path) -> tuple[str, str]:
    """The digest of a video's latents.

    Raises:
        RuntimeError: it is of its prior's own prompt, and they aren't the prior's.
    """
    report = read_json(path)
    prior = read_json(Path(report["prior_dir"], METADATA_FILE))
    chosen = [f"{name} {report[name]}" for name in CHOICES if report.get(name) not in (None, "")]
    label = ", ".join([report["prior_run_id"], report["prompt"] or "no prompt", *chosen])
    if report["prompt"] == prior["prompt"] and report["latents_sha256"] != prior["latents_sha256"]:
        raise RuntimeError(f"the prior's own prompt, and not its own latents: {label}")
    return label, report["latents_sha256"]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's entries."""
    return json.loads(path.read_text(encoding="utf-8"))


def run_all(scripts: Path, work: Path, *, jobs: int) -> tuple[Digests, list[str]]:
    """Run all command lines, so many at a time; the digests, and what went wrong."""
    digests: Digests = {}
    wrong: list[str] = []

    def run(name: str, line: str, folder: Path) -> None:
        started = time.perf_counter()
        try:
            entries = [entry for path in make(line, scripts, work, folder) for entry in read_made(path)]
            digests[name] = dict(entries)
            if len(digests[name]) < len(entries):
                raise RuntimeError("two results of one name")
        except Exception as error:  # another's result is still worth having
            wrong.append(f"{name}: {type(error).__name__}: {error}")
        print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr)

    (work / LINES_FILE).write_text("\n".join(LINES), encoding="utf-8")
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda name: run(name, FIRST[name], work), FIRST))
        list(pool.map(lambda name: run(name, SECOND[name], Path(tempfile.mkdtemp(dir=work))), SECOND))
    undisturbed, finished = (
        sorted(digests.get(name, {}).values()) for name in ("still", "stopped, finished")
    )
    if undisturbed != finished:
        wrong.append("stopped, finished: not what a run that was never stopped ends in")
    return {name: digests[name] for name in FIRST | SECOND if name in digests}, wrong


def facts(prior: Path) -> dict[str, Any]:
    """What last bits depend on, as a prior made here records it."""
    metadata = read_json(prior / METADATA_FILE)
    return {name: metadata[name] for name in ("device_name", "num_threads", "versions")}


def commit(scripts: Path) -> str | None:
    """The commit of a checkout, with "-dirty" where files differ from it."""
    command = ["git", "-C", str(scripts), "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None


def differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """What was found and isn't as recorded, by name."""
    if recorded["commands"] != found["commands"]:
        yield "recorded with other command lines; record anew with --write"
    for name in found["digests"]:
        then, now = recorded["digests"].get(name, {}), found["digests"][name]
        for label in {**then, **now}:
            old, new = (digests.get(label, "none")[:12] for digests in (then, now))
            if then.get(label) != now.get(label):
                yield f"{name}: {label}: {new}, recorded {old}"


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scripts", type=Path, default=ROOT, help="the checkout whose scripts are run")
    parser.add_argument("--recorded", type=Path, default=HERE / "results" / "same_latents.json")
    parser.add_argument("--write", action="store_true", help="record the digests instead of comparing them")
    parser.add_argument("--jobs", type=int, default=2, help="command lines at a time (default: 2)")
    args = parser.parse_args()
    if not args.write and not args.recorded.is_file():
        parser.error(f"--recorded {args.recorded} is not a file; make it with --write")
    return args


def main() -> None:
    """Run everything, then compare or record."""
    args = parse_args()
    recorded = None if args.write else read_json(args.recorded)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        digests, wrong = run_all(args.scripts.resolve(), Path(folder), jobs=args.jobs)
        here = facts(Path(folder, "run_still")) if "still" in digests else {}
    found = {
        "commit": commit(args.scripts),
        **here,
        "cores": os.cpu_count(),
        "seconds": round(time.perf_counter() - started),
        "commands": {**FIRST, **SECOND, LINES_FILE: list(LINES)},
        "digests": digests,
    }
    if recorded is not None:
        for name in here:
            if recorded[name] != here[name]:
                print(f"warning: {name} is {here[name]}, recorded {recorded[name]}", file=sys.stderr)
        wrong += differences(recorded, found)
    elif not wrong:
        args.recorded.parent.mkdir(parents=True, exist_ok=True)
        args.recorded.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for each in wrong:
        print(each)
    number = sum(map(len, digests.values()))
    print(f"{number} digests of {len(digests)} command lines, {found['seconds']} s, {len(wrong)} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
