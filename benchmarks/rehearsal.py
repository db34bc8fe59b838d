"""Run both scripts on a model of the Wan family at full size, without its weights, on a CPU.

    python benchmarks/rehearsal.py Fun-1.3B-InP
    python benchmarks/rehearsal.py I2V-480P --height 32 --width 32 --num_frames 5 --num_inference_steps 2

Makes a folder of sparse checkpoints (sparse.py): the published names, keys, shapes and dtypes, by which
DiffSynth recognises them, and zeros that take no disk. Then, as a user would, with --device cpu:
generate_prior.py; its own prompt resumed after every step that is named in --start_steps, which has to
give the prior's latents; and a new prompt by the default method. Seconds, peak memory and disk go to
--output/<model>.json, and summary.md in there is written again from all of them.

What a real model's clip looks like it can't tell; that loading, offload, sizes and exactness hold at full
size it can. Takes minutes for 1.3B, up to half an hour for 14B on 2 CPU cores, and 1 to 6 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

from sparse import make_model

from step_skip.files.writing import write_json
from step_skip.models.families import FAMILIES, MODELS
from step_skip.models.machine import describe_machine, installed_versions

PROMPT, OTHER_PROMPT = "she stays still", "she turns her head and laughs"
SAMPLE_SECONDS = 0.1


def main(argv: list[str] | None = None) -> None:
    """Make the folder, run the commands, write what they took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--num_frames", type=int, default=9)
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument(
        "--start_steps", type=int, nargs="*", help="(default: after the first step, and 6 of 10)"
    )
    parser.add_argument("--vram", default="disk", help="disk: every layer stays there until it is needed")
    parser.add_argument("--folder", type=Path, help="for checkpoints and priors (default: a temporary one)")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "rehearsal")
    args = parser.parse_args(argv)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="rehearsal_"))
    try:
        result = rehearse(args, folder)
    finally:
        if args.folder is None:
            shutil.rmtree(folder)
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / f"{args.model}.json", result)
    summary = summarize(args.output)
    (args.output / "summary.md").write_text(summary, encoding="utf-8")
    print(summary)
    if not all(run["as_expected"] for run in result["runs"]):
        sys.exit(f"{args.model}: not as expected, see {args.output / f'{args.model}.json'}")


def rehearse(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything for one model, as it goes to its JSON."""
    begin = time.perf_counter()
    size = make_model(folder / "weights", args.model)
    print(f"{args.model}: {size['logical'] / 1e9:.1f} GB in {size['on_disk'] / 1e9:.1f}", file=sys.stderr)
    steps = args.num_inference_steps
    start_steps = sorted({0, steps * 6 // 10}) if args.start_steps is None else args.start_steps
    common = ["--model_dir", folder / "weights", "--device", "cpu", "--vram", args.vram]
    sizes = {name: getattr(args, name) for name in ("height", "width", "num_frames", "num_inference_steps")}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", value)]
    made_in = time.perf_counter() - begin
    prior, run = run_script(
        "generate_prior.py",
        *("--model", args.model, "--prompt", PROMPT, "--output_dir", folder / "priors", *flags),
        *(*image_flags(args.model, folder), *common),
    )
    metadata = json.loads((prior / "run_metadata.json").read_text(encoding="utf-8"))
    runs = [{"what": "prior", "forwards": metadata["forwards"], "as_expected": True, **run}]
    own = [("own prompt after step", step, ["--start_step", step]) for step in start_steps]
    for what, step, words in [*own, ("new prompt, differential", "", ["--prompt", OTHER_PROMPT])]:
        clip, run = run_script("infer_from_prior.py", "--prior_dir", prior, *words, *common)
        report = json.loads(clip.with_suffix(".json").read_text(encoding="utf-8"))
        is_same = report["latents_sha256"] == metadata["latents_sha256"]
        runs.append(
            {
                "what": f"{what} {step}".strip(),
                "forwards": report["forwards"],
                "components": report["components_loaded"],
                "as_expected": is_same == (what != "new prompt, differential"),
                **run,
            }
        )
    return {
        "model": args.model,
        **sizes,
        "vram": args.vram,
        "dtype": metadata["dtype"],
        "weights_bytes": size,
        "seconds_to_make_the_files": made_in,
        "runs": runs,
        "machine": describe_machine("cpu"),
        "versions": installed_versions(),
    }


def image_flags(model: str, folder: Path) -> list[object]:
    """Pictures for the images that a model takes."""
    from PIL import Image

    family, flags = FAMILIES[MODELS[model].family], []
    gradient = Image.linear_gradient("L").resize((256, 256))
    for turn, (flag, need) in enumerate((("--image", family.image), ("--end_image", family.end_image))):
        if need != "none":
            path = folder / f"{flag[2:]}.png"
            Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180 * turn))).save(path)
            flags += [flag, path]
    return flags


def run_script(script: str, *flags: object) -> tuple[Path, dict[str, float]]:
    """Run a script as a user does.

    Returns:
        The path on its last line, and its seconds and peak memory in bytes.
    """
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    peak = {"VmHWM": 0, "RssAnon": 0}
    watcher = threading.Thread(target=watch_memory, args=(process.pid, peak))
    watcher.start()
    out, _ = process.communicate()
    seconds = time.perf_counter() - begin
    watcher.join()
    if process.returncode != 0:
        sys.exit(f"{script} ended with {process.returncode}: {' '.join(command)}")
    memory = {"peak_rss_bytes": peak["VmHWM"], "peak_anonymous_bytes": peak["RssAnon"]}
    return Path(out.splitlines()[-1]), {"seconds": seconds, **memory}


def watch_memory(pid: int, peak: dict[str, int]) -> None:
    """Note the highest values of these lines of a process' status, in bytes, until it ends (Linux)."""
    while True:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except (OSError, ProcessLookupError):
            return
        found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", status, flags=re.MULTILINE))
        if "VmHWM" not in found:  # it has ended
            return
        for name in peak:
            peak[name] = max(peak[name], 1024 * int(found[name]))
        time.sleep(SAMPLE_SECONDS)


def summarize(folder: Path) -> str:
    """The table of all results in a folder."""
    head = (
        "| model | weights: size / on disk here | run | forwards | seconds | peak memory: all / anonymous "
        "| latents |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
    )
    order = {name: i for i, name in enumerate(MODELS)}
    results = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    rows = [row for each in sorted(results, key=lambda each: order[each["model"]]) for row in rows_of(each)]
    return head + "\n".join(rows) + "\n"


def rows_of(result: dict[str, Any]) -> list[str]:
    """A model's rows."""
    weights = result["weights_bytes"]
    size = f"{result['height']} x {result['width']} x {result['num_frames']}"
    steps = f"{result['num_inference_steps']} steps"
    rows = []
    for run in result["runs"]:
        is_first = run["what"] == "prior"
        verdict = (
            "" if is_first else "other latents" if "new prompt" in run["what"] else "the prior's latents"
        )
        cells = [
            result["model"] if is_first else "",
            f"{weights['logical'] / 1e9:.1f} / {weights['on_disk'] / 1e9:.1f} GB" if is_first else "",
            f"prior, {size}, {steps}" if is_first else run["what"],
            str(run["forwards"]),
            f"{run['seconds']:.0f}",
            f"{run['peak_rss_bytes'] / 2**30:.1f} / {run['peak_anonymous_bytes'] / 2**30:.1f} GiB",
            ("" if is_first else verdict) if run["as_expected"] else "NOT AS EXPECTED",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


if __name__ == "__main__":
    main()
