"""What a sweep costs besides its videos: planning many jobs, memory by the number of priors, asking again.

    python benchmarks/scale.py --output benchmarks/results/scale.json

No video is computed. Priors are copies of one of the embedded model, with a run_id of their own and their
files as hard links; for memory they have latents of 480 x 832 pixels and 33 frames in float32, with random
values. Every figure is of a process of its own: CPU seconds with imports, and the most memory it took.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import infer_from_prior
from step_skip.files.reading import sha256_file
from step_skip.files.writing import write_json
from step_skip.infer.choices import Choices
from step_skip.infer.report import describe_settings
from step_skip.prior.metadata import sealed
from step_skip.prior.prior import IMAGE_FILE
from step_skip.prior.schema import METADATA_FILE
from step_skip.sweep.clips import all_jobs, make_groups
from step_skip.sweep.cost import summarize_jobs
from step_skip.sweep.finished import find_existing

IMAGE = ROOT / "data" / "tiny_wan_i2v" / "inputs" / "mila.png"
LARGE = {"height": 480, "width": 832, "num_frames": 33}
PLANNED = ((50, 1000), (1, 50_000), (1000, 1000))
PRIORS = (10, 200)
FLAGS = ("--model", "tiny", "--prompt", "she stays still")
CLIPS = 5000
IMAGES = 2000


def copies(prior: Path, number: int, folder: Path) -> list[Path]:
    """So many priors that differ in nothing but their names."""
    metadata, made = json.loads((prior / METADATA_FILE).read_text()), []
    for each in range(number):
        copy = folder / f"run_{each:04d}"
        copy.mkdir(parents=True)
        for name in metadata["files"]:
            os.link(prior / name, copy / name)
        write_json(copy / METADATA_FILE, sealed(metadata | {"run_id": f"{each:04d}"}))
        made.append(copy)
    return made


def make_large(prior: Path) -> None:
    """Give a prior the tensors of a larger video, with random values."""
    import torch

    from step_skip.prior.metadata import read_prior
    from step_skip.prior.writer import PriorWriter

    small = read_prior(prior)
    metadata = small.metadata.model_copy(update=LARGE)
    tensors = [name for name in metadata.files if name.endswith(".pt") and not name.startswith("context")]
    files = {name: digest for name, digest in metadata.files.items() if name not in tensors}
    writer = PriorWriter(prior, metadata.model_copy(update={"files": files}))
    for name in tensors:
        shape = list(writer.prior.latents_shape)
        if name == "y.pt":
            shape[1] += 4
        elif name == "clip_feature.pt":
            shape = small.metadata.shapes[name]
        writer.save_tensor(name, torch.randn(shape))
    writer.finish("complete")


# --- measured, each in a process of its own -----------------------------------------------------------------


def ask(priors: list[Path], prompts: Path, *flags: str) -> None:
    """infer_from_prior.py, with its output thrown away, line by line."""
    argv = ["--prior_dir", *map(str, priors), "--prompts_file", str(prompts), *flags]
    with contextlib.redirect_stdout(io.StringIO()):
        result = infer_from_prior.main(argv)
        for _ in result if isinstance(result, Iterator) else ():
            pass


def plan(priors: list[Path], prompts: Path) -> None:
    """A dry run of everything."""
    ask(priors, prompts, "--dry_run")


def count(priors: list[Path], prompts: Path) -> None:
    """The jobs, their names, which are made and what they cost, without a line for each."""
    groups, _ = make_groups(priors, choices_of(priors, prompts))
    find_existing(groups)
    print(summarize_jobs(all_jobs(groups)), file=sys.stderr)


def choices_of(priors: list[Path], prompts: Path) -> list[Choices]:
    """What the command line asks for."""
    argv = ["--prior_dir", *map(str, priors), "--prompts_file", str(prompts)]
    return prompts.read_choices(infer_from_prior.parse_args(argv))


def read(priors: list[Path], prompts: Path) -> None:
    """A sweep whose priors are read and whose videos are not made."""
    from step_skip.sweep import make_clips

    make_clips.run_job = lambda *_, **__: None
    infer_from_prior.write_page = lambda *_: None
    ask(priors, prompts, "--output_dir", str(prompts.parent / f"sweep_{len(priors)}"))


def look(priors: list[Path], prompts: Path) -> None:
    """What a finished sweep finds, asked again; its page is left out."""
    infer_from_prior.write_page = lambda *_: None
    ask(priors, prompts, "--output_dir", str(prompts.parent / "finished"))


def pretend(priors: list[Path], prompts: Path) -> None:
    """Put a video and its JSON where each of a sweep's would be."""
    folder, video = prompts.parent / "finished", (priors[0] / "output_full.mp4").read_bytes()
    folder.mkdir()
    groups, _ = make_groups(priors, choices_of(priors, prompts), output_dir=folder)
    for group in groups:
        for job in group.jobs:
            job.path.write_bytes(video)
            report = describe_settings(group, job.plan) | {"video_bytes": len(video), "video_sha256": ""}
            job.report_path.write_text(json.dumps(report, indent=2))


def photograph(priors: list[Path], prompts: Path) -> None:
    """Images of 600 x 600 pixels that differ in one, each with its prior, of which only the metadata."""
    from PIL import Image

    photos, [made] = prompts.parent / "photos", priors
    photos.mkdir()
    picture = Image.open(IMAGE).convert("RGB").resize((600, 600))
    metadata = json.loads((made / METADATA_FILE).read_text())
    for number in range(IMAGES):
        file, folder = photos / f"face_{number}.png", prompts.parent / "priors" / f"run_face_{number}"
        picture.putpixel((0, 0), (number % 256, number // 256, 0))
        picture.save(file)
        source = metadata["images"][IMAGE_FILE] | {"name": file.name, "sha256": sha256_file(file)}
        own = {"run_id": f"face_{number}", "images": {IMAGE_FILE: source}}
        folder.mkdir(parents=True)
        write_json(folder / METADATA_FILE, sealed(metadata | own))


def ask_priors(priors: list[Path], prompts: Path) -> None:
    """What generate_prior.py finds in that folder, asked for all of them."""
    import generate_prior

    folder = prompts.parent
    argv = [*FLAGS, "--image", str(folder / "photos"), "--output_dir", str(folder / "priors")]
    if len(list(generate_prior.main(argv))) != IMAGES:
        raise SystemExit("a prior was made again")


STEPS = {step.__name__: step for step in (plan, count, read, look, pretend, photograph, ask_priors)}


def measure(step: str, folder: Path, prompts: int) -> dict[str, float]:
    """A step with all priors of a folder and so many prompts, in a process of its own."""
    file = folder / "prompts.txt"
    file.write_text("\n".join(f"she moves {number}" for number in range(prompts)))
    begin = time.perf_counter()
    command = [sys.executable, __file__, "--measure", step, "--folder", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1]) | {"seconds": round(time.perf_counter() - begin, 2)}


def measured(step: str, folder: Path) -> dict[str, float]:
    """The same, within it."""
    STEPS[step](sorted(folder.glob("run_*")), folder / "prompts.txt")
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(each.ru_utime + each.ru_stime for each in used)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"cpu_seconds": round(seconds, 2), "peak_mb": round(int(status["VmHWM"].split()[0]) / 1024)}


def main() -> None:
    """Measure everything and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=HERE / "out" / "scale.json")
    parser.add_argument("--measure", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measured(args.measure, args.folder)))
        return
    import generate_prior

    args.output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp())
    prior = Path(generate_prior.main([*FLAGS, "--image", str(IMAGE), "--output_dir", str(work)]))
    load = {"cores": os.cpu_count(), "load": os.getloadavg()[0]}
    result: dict[str, Any] = load | {"planned": {}, "dry_run": {}, "peak_memory": {}}
    make_large(large := Path(shutil.copytree(prior, work / "large")))
    for priors in PRIORS:
        copies(large, priors, folder := work / f"read_{priors}")
        result["peak_memory"][f"{priors} priors of 480p"] = measure("read", folder, 1)
        write_json(args.output, result)
    for priors, prompts in PLANNED:
        copies(prior, priors, folder := work / f"planned_{priors}_{prompts}")
        name = f"{priors} priors x {prompts} prompts"
        result["planned"][name] = measure("count", folder, prompts)
        result["dry_run"][name] = measure("plan", folder, prompts)
    copies(prior, 5, folder := work / "asked")
    measure("pretend", folder, CLIPS // 5)
    result["asked_again"] = {f"{CLIPS} clips": measure("look", folder, CLIPS // 5)}
    copies(prior, 1, folder := work / "photographed")
    measure("photograph", folder, 1)
    result["asked_again"][f"{IMAGES} priors of images"] = measure("ask_priors", folder, 1)
    write_json(args.output, result)
    shutil.rmtree(work)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
