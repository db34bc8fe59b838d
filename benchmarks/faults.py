"""A campaign of faults: processes killed at random moments, priors damaged at random.

    python benchmarks/faults.py --kills 300 --damages 10000 --output benchmarks/results/faults.json

Kills: SIGKILL at a random moment of making a prior, of resuming one and of a sweep, on a small untrained
model; then what is on disk is looked at, the same is started again, and the end is compared with an
undisturbed run's, byte for byte. Each is a process of its own, forked from one that has imported torch.

Damages: bits flipped, files cut, lengthened, swapped, removed, replaced by a link or a folder, entries of the
metadata changed in value and type (some with a checksum that agrees). infer_from_prior.py then reads the
prior up to the loading of the model: it has to refuse in one line, or to have exactly the tensors and
choices of the undamaged prior. What generate_prior.py --resume reads is tried, too.

Forgeries: what a stranger would make of a prior, with checksums that agree; see forgeries.py.

Exits 1 if anything was lost or wrong. tests/test_faults.py runs a short form.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import forgeries
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import generate_prior
import infer_from_prior
from step_skip.cli.terminal import run_script
from step_skip.errors import InputError
from step_skip.files.reading import sha256_file
from step_skip.files.writing import TEMPORARY_PREFIX, write_json
from step_skip.generate.resume import check_same_machine, read_resumable
from step_skip.generate.run import what_is_left
from step_skip.models.machine import installed_versions
from step_skip.prior.checks import check_fingerprint
from step_skip.prior.files import damaged_files
from step_skip.prior.metadata import SEAL, read_run, sealed
from step_skip.prior.prior import step_file
from step_skip.prior.schema import METADATA_FILE
from step_skip.sweep.clips import Group
from step_skip.sweep.make_clips import ThisProcess

PROMPTS = ("The portrait moves left.", "The portrait sinks, eyes shut.")
STEPS = 4
TIMES = {"created", "seconds", "seconds_per_step", "peak_memory", "run_id"}


@dataclass
class Ground:
    """Where the campaign runs: a model, an image, and what undisturbed runs make of them."""

    folder: Path
    model_dir: Path
    image: Path
    prior: Path = field(init=False)
    sweep_dir: Path = field(init=False)

    def generate(self, output_dir: Path, run_id: str, *flags: str) -> list[str]:
        """The command line of a prior."""
        words = [
            "--model",
            "tiny",
            "--model_dir",
            self.model_dir,
            "--image",
            self.image,
            "--prompt",
            PROMPTS[0],
        ]
        words += ["--num_inference_steps", STEPS, "--output_dir", output_dir, "--run_id", run_id, *flags]
        return list(map(str, words))

    def resume(self, prior: Path) -> list[str]:
        """The command line that finishes a prior."""
        return ["--resume", str(prior), "--model_dir", str(self.model_dir)]

    def sweep(self, prior: Path, output_dir: Path) -> list[str]:
        """The command line of a sweep of four videos."""
        words = ["--prior_dir", prior, "--model_dir", self.model_dir, "--prompt", *PROMPTS]
        return list(map(str, [*words, "--start_step", 0, 2, "--output_dir", output_dir]))


def prepare(folder: Path) -> Ground:
    """Make the model, an image and the undisturbed runs."""
    from conftest import build_model, save_image

    (folder / "model").mkdir()
    ground = Ground(folder, build_model(folder / "model"), save_image(folder / "image.png"))
    ground.prior, ground.sweep_dir = folder / "run_undisturbed", folder / "sweep"
    assert run(generate_prior.main, ground.generate(folder, "undisturbed")) == 0
    assert run(infer_from_prior.main, ground.sweep(ground.prior, ground.sweep_dir)) == 0
    return ground


# --- killing ------------------------------------------------------------------------------------------------


def start(main: Callable[[list[str]], object], argv: list[str]) -> int:
    """Run a script's main in a process of its own; returns its id."""
    process = os.fork()
    if process == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            run_script(lambda: main(argv))
        except SystemExit as ended:
            os._exit(ended.code)
        except BaseException:
            os._exit(99)  # a traceback
    return process


def run(main: Callable[[list[str]], object], argv: list[str]) -> int:
    """Run a script's main to its end; returns its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(start(main, argv), 0)[1])


def run_killed(main: Callable[[list[str]], object], argv: list[str], after: float) -> bool:
    """Kill it after so many seconds; False where it had ended by itself."""
    process = start(main, argv)
    time.sleep(after)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def seconds_of(main: Callable[[list[str]], object], argv: list[str]) -> float:
    """How long it takes undisturbed."""
    started = time.perf_counter()
    assert run(main, argv) == 0
    return time.perf_counter() - started


def told(prior: Path) -> dict[str, Any]:
    """A prior's metadata but for times and memory."""
    metadata = json.loads((prior / METADATA_FILE).read_text())
    return {key: value for key, value in metadata.items() if key not in TIMES | {SEAL}}


def contents(folder: Path, *suffixes: str) -> dict[str, str]:
    """SHA-256 of the files of these kinds below a folder."""
    return {
        str(path.relative_to(folder)): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.suffix in suffixes and not path.name.startswith(TEMPORARY_PREFIX)
    }


def look_at_killed(prior: Path, ground: Ground) -> Iterator[str]:
    """What is wrong with a prior that a kill has left."""
    true = contents(ground.prior, ".pt", ".mp4", ".png")
    for name, digest in contents(prior, ".pt", ".mp4", ".png").items():
        if digest != true.get(name):
            yield f"{name} has its final name and is not whole"
    if (prior / METADATA_FILE).exists():
        found = read_run(prior)
        yield from damaged_files(found).values()
        if found.is_complete and found.metadata.files.keys() != true.keys():
            yield "it looks whole and is not"


def kill_generating(ground: Ground, rng: random.Random, seconds: float, counts: Counter) -> Iterator[str]:
    """Kill a run, then kill what resumes it until it ends by itself; compare."""
    folder = Path(tempfile.mkdtemp(dir=ground.folder))
    prior = folder / "run_killed"
    main, argv, kind = generate_prior.main, ground.generate(folder, "killed"), "generating"
    while run_killed(main, argv, rng.uniform(0, 1.05 * seconds)):
        counts[f"kills while {kind}"] += 1
        yield from look_at_killed(prior, ground)
        if (prior / METADATA_FILE).exists():
            argv, kind = ground.resume(prior), "resuming"
        else:
            shutil.rmtree(prior, ignore_errors=True)  # nothing had begun
    whole = read_run(prior).whole_steps
    kept = {step: (prior / step_file(step)).stat().st_mtime_ns for step in range(whole)}
    if run(main, ground.resume(prior)) != 0:
        yield f"{prior} could not be resumed"
        return
    for step, written in kept.items():
        if (prior / step_file(step)).stat().st_mtime_ns != written:
            yield f"step {step} was lost"
    if contents(prior, ".pt", ".mp4", ".png") != contents(ground.prior, ".pt", ".mp4", ".png"):
        yield "the files are not an undisturbed run's"
    if told(prior) != told(ground.prior):
        yield "the metadata is not an undisturbed run's"
    counts["priors finished and compared"] += 1
    shutil.rmtree(folder)


def kill_sweeping(ground: Ground, rng: random.Random, seconds: float, counts: Counter) -> Iterator[str]:
    """Kill a sweep until it ends by itself; compare its videos."""
    folder = Path(tempfile.mkdtemp(dir=ground.folder))
    argv = ground.sweep(ground.prior, folder)
    while run_killed(infer_from_prior.main, argv, rng.uniform(0, 1.05 * seconds)):
        counts["kills while sweeping"] += 1
        true = contents(ground.sweep_dir, ".mp4")
        for name, digest in contents(folder, ".mp4").items():
            if digest != true.get(name):
                yield f"{name} has its final name and is not whole"
        for report in folder.glob("step*.json"):
            data = json.loads(report.read_text())
            if data["video_sha256"] != true.get(report.with_suffix(".mp4").name):
                yield f"{report.name} vouches for another video"
    if run(infer_from_prior.main, argv) != 0:
        yield "the sweep could not go on"
    if contents(folder, ".mp4") != contents(ground.sweep_dir, ".mp4"):
        yield "the videos are not an undisturbed sweep's"
    counts["sweeps finished and compared"] += 1
    shutil.rmtree(folder)


def kill(ground: Ground, kills: int, *, seed: int, progress: Callable[[dict[str, int]], None]) -> list[str]:
    """Kill so often; returns what went wrong."""
    rng, counts, wrong = random.Random(seed), Counter(), []
    whole = seconds_of(generate_prior.main, ground.generate(ground.folder, "timed"))
    swept = seconds_of(infer_from_prior.main, ground.sweep(ground.prior, ground.folder / "timed"))
    while sum(count for name, count in counts.items() if name.startswith("kills")) < kills:
        if rng.random() < 0.7:
            wrong += kill_generating(ground, rng, whole, counts)
        else:
            wrong += kill_sweeping(ground, rng, swept, counts)
        progress(dict(counts) | {"wrong": len(wrong)})
    return wrong


# --- damaging -----------------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-2, 2), max_size=3),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
    st.just([[[[[[[[[[[[1]]]]]]]]]]]]),
    st.sampled_from(["../x", "/etc/passwd", "bfloat16", "running", "stopped", "complete", "\ud800", ...]),
)


def paths_of(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The place of every entry of a JSON value."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in entries:
        yield (*path, key)
        yield from paths_of(inner, (*path, key))


def damages(prior: Path) -> st.SearchStrategy:
    """Ways to damage a prior, as (kind, file, detail)."""
    names = st.sampled_from(sorted(path.name for path in prior.iterdir() if path.is_file()))
    metadata = json.loads((prior / METADATA_FILE).read_text())
    places = st.sampled_from(sorted(paths_of(metadata), key=str))
    share = st.floats(0, 1, exclude_max=True)
    return st.one_of(
        st.tuples(st.just("flip"), names, st.tuples(share, st.integers(0, 7))),
        st.tuples(st.just("flip"), st.just(METADATA_FILE), st.tuples(share, st.integers(0, 7))),
        st.tuples(st.just("cut"), names, share),
        st.tuples(st.just("lengthen"), names, st.binary(min_size=1, max_size=64)),
        st.tuples(st.just("overwrite"), names, st.tuples(share, st.binary(min_size=1, max_size=64))),
        st.tuples(st.just("swap"), names, names),
        st.tuples(st.sampled_from(["remove", "link", "folder"]), names, st.none()),
        st.tuples(st.just("edit"), places, VALUES),
        st.tuples(st.just("edit and seal"), places, VALUES),
    )


def edited(metadata: Any, path: tuple, value: object) -> Any:
    """The metadata with another value at a place; `...` removes the entry."""
    metadata = json.loads(json.dumps(metadata))
    inner = metadata
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return metadata


@contextlib.contextmanager
def damaged(prior: Path, kind: str, where: Any, detail: Any) -> Iterator[None]:
    """A prior with this damage, for the length of a `with`."""
    name = METADATA_FILE if kind.startswith("edit") else where
    names = [name, detail] if kind == "swap" else [name]
    before = {each: (prior / each).read_bytes() for each in names}
    path, content = prior / name, before[name]
    try:
        if kind == "swap":
            path.write_bytes(before[detail])
            (prior / detail).write_bytes(content)
        elif kind.startswith("edit"):
            metadata = edited(json.loads(content), where, detail)
            metadata = sealed(metadata) if kind.endswith("seal") else metadata
            path.write_text(json.dumps(metadata))
        elif kind in ("remove", "link", "folder"):
            path.unlink()
            if kind == "link":
                path.symlink_to("/etc/hostname")
            elif kind == "folder":
                path.mkdir()
        else:
            path.write_bytes(changed(kind, content, detail))
        yield
    finally:
        for each, old in before.items():
            if (prior / each).is_dir():
                (prior / each).rmdir()
            (prior / each).unlink(missing_ok=True)
            (prior / each).write_bytes(old)


def changed(kind: str, content: bytes, detail: Any) -> bytes:
    """A file's content, damaged."""
    if kind == "cut":
        return content[: int(detail * len(content))]
    if kind == "lengthen":
        return content + detail
    place = int(detail[0] * len(content))
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ (1 << detail[1])]) + content[place + 1 :]
    return content[:place] + detail[1] + content[place + len(detail[1]) :]


def used(prior: Path, ground: Ground, flags: list[str]) -> tuple[object, dict[str, Any]] | None:
    """The plan and the tensors infer_from_prior.py would run with; None: it refused."""
    argv = ["--prior_dir", str(prior), "--model_dir", str(ground.model_dir), *flags]
    taken = []

    def take(machine: ThisProcess, groups: list[Group], *_: object, **__: object) -> dict:
        fingerprint = json.loads((ground.prior / METADATA_FILE).read_text())["model_fingerprint"]
        check_fingerprint(groups[0].prior, fingerprint)
        taken.append((groups[0].plans[0], groups[0].inputs.tensors))
        return {}

    make, ThisProcess.make = ThisProcess.make, take
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            infer_from_prior.main(argv)
    except InputError as error:
        assert str(error)
        return None
    finally:
        ThisProcess.make = make
    return taken[0]


def try_resuming(prior: Path) -> None:
    """What generate_prior.py --resume reads before it loads a model; refusals are fine."""
    with contextlib.suppress(InputError), contextlib.redirect_stderr(io.StringIO()):
        found = read_resumable(prior)
        what_is_left(found)
        check_same_machine(found, "cpu")


def is_same(found: tuple[object, dict], true: tuple[object, dict], *, edited: bool) -> bool:
    """The same plan and the same tensors bit for bit; of metadata that says otherwise, no other tensor."""
    import torch

    (plan, tensors), (true_plan, true_tensors) = found, true
    if not edited and (plan != true_plan or tensors.keys() != true_tensors.keys()):
        return False
    return all(
        name in true_tensors and torch.equal(tensor, true_tensors[name]) for name, tensor in tensors.items()
    )


def damage(
    ground: Ground,
    number: int,
    *,
    seed_: int,
    kinds: Counter,
    progress: Callable[[Counter], None] = lambda kinds: None,
) -> None:
    """Damage a prior so often.

    Raises:
        AssertionError: it was read as something else than it is.
        Exception: what would be a traceback.
    """
    copy = Path(shutil.copytree(ground.prior, ground.folder / "damaged"))
    choices = (["--start_step", "2"], ["--num_steps", "2"], ["--start_step", str(STEPS - 1)])
    true = {" ".join(flags): used(copy, ground, flags) for flags in choices}
    assert None not in true.values()

    @seed(seed_)
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(damages(ground.prior), st.sampled_from(choices))
    def one(how: tuple[str, Any, Any], flags: list[str]) -> None:
        with damaged(copy, *how):
            found = used(copy, ground, flags)
            try_resuming(copy)
        kinds[f"{how[0]}: {'refused' if found is None else 'exact'}"] += 1
        if found is not None:
            assert is_same(found, true[" ".join(flags)], edited=how[0] == "edit and seal"), how
        if sum(kinds.values()) % 500 == 0:
            progress(kinds)

    one()


def forge(ground: Ground, number: int, *, seed: int, note: Callable[..., None]) -> list[str]:
    """Forge priors so often; notes and returns what went wrong."""
    kinds = Counter()

    def progress(wrong: list[str]) -> None:
        note(forged=sum(kinds.values()), forgeries=dict(sorted(kinds.items())), wrong_forgeries=list(wrong))

    wrong = forgeries.forgeries(ground, number, seed=seed, kinds=kinds, progress=progress)
    progress(wrong)
    return wrong


def main() -> None:
    """Run the campaign and write down what was run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--damages", type=int, default=10_000)
    parser.add_argument("--forgeries", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE / "out" / "faults.json")
    args = parser.parse_args()
    result: dict[str, Any] = {"seed": args.seed, "versions": installed_versions()}

    def note(**entries: object) -> None:
        result.update(entries)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, result)

    def note_damages(kinds: Counter) -> None:  # the first wrong one ends the campaign
        note(damaged=sum(kinds.values()), damages=dict(sorted(kinds.items())), wrong_reads=0, tracebacks=0)

    with tempfile.TemporaryDirectory() as folder:
        ground, kinds = prepare(Path(folder)), Counter()
        if args.damages:
            damage(ground, args.damages, seed_=args.seed, kinds=kinds, progress=note_damages)
            note_damages(kinds)
        wrong = []
        if args.kills:
            wrong = kill(ground, args.kills, seed=args.seed, progress=lambda counts: note(kills=counts))
            note(wrong_after_kills=wrong)
        if args.forgeries:
            wrong += forge(ground, args.forgeries, seed=args.seed, note=note)
    print(json.dumps(result, indent=2))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
