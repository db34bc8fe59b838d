"""A campaign of forgeries: priors and sweeps as a stranger would make them, whose checksums all agree.

    python benchmarks/faults.py --kills 0 --damages 0 --forgeries 20000 \
        --output benchmarks/results/forgeries.json

A case is a prior of this version or of the pull request's scripts, with a sweep in it, of which an entry or
two of the metadata or of a result's JSON say something else, or of which a file or a folder is a link, a
pipe, a socket, a hole of 8 GiB, a file of the user's under a second name, empty, or another file. All that
records a checksum is sealed anew. Then a command is run on it: a clip, a sweep, its plan, --verify, --resume,
a page.

The commands run in this process, on a model that is loaded once, under a limit of 4 GiB above what is taken
at first, and of 10 seconds. A case is wrong that would show a traceback, exceeds a limit, sends a terminal
what isn't text, or changes a file or an entry of a folder outside the prior.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from helpers import PUBLISHED_KEYS

import generate_prior
import infer_from_prior
import prior_utils
from step_skip.cli.terminal import HIDDEN, JOINERS, ending_of, plain, show_messages
from step_skip.files.reading import sha256_file
from step_skip.models import loading
from step_skip.models.loading import Model, load
from step_skip.page.page import write_page
from step_skip.prior.metadata import sealed
from step_skip.prior.schema import METADATA_FILE, Metadata

SECONDS = 10
MEMORY = 4 * 2**30
HOLE = 8 * 2**30  # a sparse file's size
TEXTS = (
    "",
    "\0",
    "\x1b[2J\r\n",
    "\ud800",
    "\u202e",
    "a" * 300,
    "a" * 10**6,
    "~",
    "..",
    "/",
    "/proc/kmsg",
    "-",
)
NUMBERS = (0, 1, -1, -5, 2, 10, 10**6, 2**31, 2**63, 10**400, 0.5, -0.0, 1e-320, 1e30, 1e308)
OTHERS = (None, True, False, [], {}, [1], ["x"], [[]], {"x": 1}, {"load": "x"}, {"": None}, [0] * 10**5, ...)
SPECIAL = (float("nan"), float("inf"), -float("inf"))
KNOWN = ("running", "stopped", "complete", "float16", "bfloat16", "i2v", "tiny", "I2V-480P", "neutral")
VALUES = (*TEXTS, *NUMBERS, *OTHERS, *SPECIAL, *KNOWN)
COMMANDS = {"sweep": 1, "page": 1, "clip": 2, "path": 2, "resume": 3, "plan": 4, "verify": 4}  # how often


class TooLong(BaseException):
    """A case took longer than it may."""


class Campaign:
    """Where it runs: two priors, each with a sweep, and something of the user's beside them."""

    def __init__(self, ground: Any):
        self.ground, self.model = ground, load("tiny", model_dir=ground.model_dir)
        self.folder = ground.folder / "forged"
        self.folder.mkdir()
        self.home = self.folder / "home"
        self.home.mkdir()
        for name in ("thesis.tex", ".tmp_thesis.tex", "lora.safetensors"):
            (self.home / name).write_text("precious")
        (self.home / "kept").mkdir()
        (self.home / "kept" / ".tmp_0123456789abcdef_x.json").write_text("precious")
        self.new, self.old = self.folder / "new", self.folder / "old"
        shutil.copytree(ground.prior, self.new)
        shutil.copytree(self.new, self.old)
        for path in set(self.old.iterdir()) - set(self.old.glob("step_*.pt")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        metadata = json.loads((self.new / METADATA_FILE).read_text())
        (self.old / METADATA_FILE).write_text(json.dumps({key: metadata[key] for key in PUBLISHED_KEYS}))
        for prior in (self.new, self.old):
            for command in ("sweep", "clip"):
                with contextlib.redirect_stderr(io.StringIO()):
                    self.run(prior, command)

    def run(self, prior: Path, command: str) -> None:
        """Run a command on a prior; its errors are raised."""
        common = ["--prior_dir", prior, "--model_dir", self.ground.model_dir]
        if not (prior / "initial_latents.pt").exists():
            common += ["--model", "tiny", "--image", self.ground.image]
        prompt = ["--prompt", "The portrait moves left."]
        flags = {
            "clip": [*prompt, "--start_step", 3, "--output", prior / "clip.mp4", "--overwrite"],
            "path": ["--prompt", "Another one.", "--num_steps", 2],
            "sweep": [
                *prompt,
                "Another one.",
                "--start_step",
                3,
                "--output_dir",
                prior / "outputs" / "sweep_x",
            ],
            "plan": [*prompt, "--start_step", 2, "--dry_run"],
        }
        with self.loaded(), contextlib.redirect_stdout(sys.stderr):
            if command in flags:
                infer_from_prior.main(list(map(str, [*common, *flags[command]])))
            elif command == "verify":
                prior_utils.verify([prior])
            elif command == "resume":
                generate_prior.main(["--resume", str(prior), "--model_dir", str(self.ground.model_dir)])
            else:
                write_page(prior / "outputs" / "sweep_x")

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """The commands as they are, but that the model is loaded already."""
        real = loading.load_components, loading.release

        def load_components(options: Any, components: Any, *, check: Callable[..., Any], **_: Any) -> Model:
            check(self.model.fingerprint)
            return self.model

        loading.load_components = load_components
        loading.release = lambda pipe, names: None
        try:
            yield
        finally:
            loading.load_components, loading.release = real


# --- one case -----------------------------------------------------------------------------------------------


def edit_entries(path: Path, rng: random.Random, extra: Iterator[str] | tuple[str, ...] = ()) -> str:
    """Put other values at one or two places of a JSON file; returns what was done."""
    data, done = json.loads(path.read_text()), []
    for _ in range(rng.choice((1, 1, 2))):
        inner, key = data, rng.choice(sorted({*data, *extra}))
        while isinstance(inner.get(key) if isinstance(inner, dict) else inner[key], dict | list):
            if not (below := inner[key]) or rng.random() < 0.3:
                break
            inner, key = below, rng.choice(sorted(below) if isinstance(below, dict) else range(len(below)))
        value = rng.choice(VALUES)
        done.append(f"{key} = {plain(repr(value))[:40]}")
        if value is not ...:
            inner[key] = value
        elif isinstance(inner, list) or key in inner:
            del inner[key]
    if path.name == METADATA_FILE and "metadata_sha256" in data:
        with contextlib.suppress(ValueError, RecursionError, UnicodeError, TypeError):
            data = sealed(data)
    path.write_text(json.dumps(data))
    return "; ".join(done)


def lay(path: Path, kind: str, home: Path, rng: random.Random) -> None:
    """Put something else in the place of a file or folder."""
    others = [each for each in path.parent.iterdir() if each.is_file() and not each.is_symlink()] or [path]
    content = rng.choice(sorted(others)).read_bytes() if others != [path] or path.is_file() else b""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        path.symlink_to(
            rng.choice([home, home / "kept", home / "thesis.tex", home / "new", "/dev/zero", path])
        )
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            os.chdir(path.parent)  # a socket's path may have 108 bytes
            listening.bind(path.name)
    elif kind == "folder":
        (path / "x").mkdir(parents=True)
    elif kind == "hole":
        path.write_bytes(content)
        os.truncate(path, HOLE)
    elif kind == "hard link":
        os.link(home / "thesis.tex", path)
    elif kind == "empty":
        path.touch()
    elif kind == "cut":
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
    else:
        path.write_bytes(content)


KINDS = ("link", "pipe", "socket", "folder", "hole", "hard link", "empty", "cut", "swapped")


def forge(prior: Path, home: Path, rng: random.Random) -> tuple[str, str]:
    """Make a forgery of a prior; returns its kind and what was done."""
    metadata, reports = prior / METADATA_FILE, sorted((prior / "outputs" / "sweep_x").glob("*.json"))
    chance = rng.random()
    if chance < 0.45:
        return "metadata", edit_entries(metadata, rng, tuple(Metadata.model_fields))
    if chance < 0.55:
        path = rng.choice(reports)
        return "result", f"{path.name}: {edit_entries(path, rng)}"
    entries = [*prior.rglob("*"), prior / ".lock", prior / "contexts", prior / "outputs"]
    if rng.random() < 0.3:  # what commands write to or look into, more often than the many tensors
        entries = [metadata, *(path for path in entries if path.is_dir() or not path.exists())]
    path, kind = rng.choice(sorted(entries)), rng.choice(KINDS)
    lay(path, kind, home, rng)
    data = json.loads(metadata.read_text()) if metadata.is_file() and path != metadata else {}
    if path.name in data.get("files", {}) and path.is_file() and path.stat().st_size < HOLE:
        data["files"][path.name] = sha256_file(path)
        metadata.write_text(json.dumps(sealed(data)))
    return kind, str(path.relative_to(prior))


def state(folder: Path) -> list[tuple[object, ...]]:
    """All that can be changed below a folder without running code."""
    entries = [folder, *sorted(folder.rglob("*"))]
    contents = [path.read_bytes() if path.is_file() else b"" for path in entries]
    stats = [path.lstat() for path in entries]
    return [
        (str(path), content, stat.st_mode, stat.st_ino, stat.st_mtime_ns if path.is_file() else 0)
        for path, content, stat in zip(entries, contents, stats, strict=True)
    ]


def try_one(campaign: Campaign, rng: random.Random) -> tuple[str, str | None, str]:
    """Forge a prior and run a command on it: kind and end, what went wrong if anything, and the case."""
    original = rng.choice((campaign.new, campaign.new, campaign.old))
    [command] = rng.choices(list(COMMANDS), COMMANDS.values())
    prior = campaign.folder / "run_forged"
    shutil.copytree(original, prior)
    kind, done = forge(prior, campaign.home, rng)
    before, here = state(campaign.home), sorted(campaign.folder.iterdir())
    wrong, told, ended = None, io.StringIO(), "done"
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stderr(told):
            campaign.run(prior, command)
    except TooLong:
        wrong = "took too long"
    except BaseException as error:
        ended = "refused"
        if (known := ending_of(error)) is None:
            wrong = f"{type(error).__name__}: {error}"[:200]
        elif "out of memory" in known[1]:
            wrong = "took too much memory"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.chdir(campaign.folder)
    steering = {c for c in told.getvalue() if unicodedata.category(c) in HIDDEN and c not in JOINERS + "\n\r"}
    if steering:
        wrong = f"a terminal is sent {steering!r}"
    if state(campaign.home) != before or sorted(campaign.folder.iterdir()) != here:
        wrong = "something of the user's was changed"
    shutil.rmtree(prior)
    case = f"{original.name} prior, {kind}, {done}, {command}"
    return f"{kind}: {ended}", wrong, case


def forgeries(
    ground: Any,
    number: int,
    *,
    seed: int,
    kinds: Counter,
    progress: Callable[[list[str]], None] = lambda wrong: None,
) -> list[str]:
    """Try so many cases; returns those that went wrong.

    Args:
        kinds: counts the cases by kind and how they ended.
        progress: called now and then with what went wrong so far.
    """
    rng, wrong, before = random.Random(seed), [], Path.cwd()
    handler = signal.signal(signal.SIGALRM, _too_long)
    show_messages()
    campaign = Campaign(ground)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, limit[1]))
    try:
        for count in range(number):
            kind, problem, case = try_one(campaign, rng)
            kinds[kind] += 1
            if problem is not None:
                wrong.append(f"{case}: {problem}")
            if count % 100 == 99:
                progress(wrong)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
        signal.signal(signal.SIGALRM, handler)
        os.chdir(before)
        shutil.rmtree(campaign.folder)
    return wrong


def _too_long(signum: int, frame: FrameType | None) -> None:
    raise TooLong
