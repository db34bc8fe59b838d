"""What the tests share: command lines run in process, as a user runs them, and what a refusal looks like."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import subprocess
import sys
import types
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_skip.cli.terminal import run_script
from step_skip.prior.metadata import sealed
from step_skip.prior.schema import Metadata

ROOT = Path(__file__).resolve().parents[1]
SIZE = 32  # pixels, height and width
FRAMES = 9
PROMPT, OTHER_PROMPT = "The portrait moves left.", "The portrait sinks, eyes shut."

# the names that the pull request's scripts read and write
PUBLISHED_KEYS = {
    "run_id",
    "num_inference_steps",
    "scheduler_timesteps",
    "scheduler_sigmas",
    "denoising_strength",
    "sigma_shift",
    "height",
    "width",
    "num_frames",
}


@dataclass
class Outcome:
    """How a command line ended."""

    code: int
    out: str
    err: str

    @property
    def path(self) -> Path:
        """The last line of stdout, of a run that succeeded."""
        assert self.code == 0, self.err
        return Path(self.out.splitlines()[-1])

    @property
    def report(self) -> dict[str, Any]:
        """The JSON file beside the video."""
        return read_json(self.path.with_suffix(".json"))

    @property
    def error(self) -> str:
        """The one error line."""
        errors = [line for line in self.err.splitlines() if ": error: " in line]
        assert len(errors) == 1, self.err
        assert self.err.splitlines()[-1] == errors[0], self.err
        assert "Traceback" not in self.err
        return errors[0]


def run_in_process(script: str, *argv: object, capsys: Any, monkeypatch: Any) -> Outcome:
    """Run `python <script>.py <argv>` without the seconds of a fresh interpreter's imports."""
    module = importlib.import_module(script)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, argv)])
        try:
            run_script(module.main)
        except SystemExit as ended:
            code = ended.code
    return Outcome(code, *capsys.readouterr())


def run_as_user(
    *command: object, cwd: Path, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Run `python <command>` in an interpreter of its own, from the folder `cwd`."""
    argv = [sys.executable, *map(str, command)]
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's content."""
    return json.loads(path.read_text(encoding="utf-8"))


def edit_metadata(prior: Path, **changes: Any) -> None:
    """Change entries of a prior's metadata; a value of `...` removes the entry."""
    path = prior / "run_metadata.json"
    metadata = {key: value for key, value in (read_json(path) | changes).items() if value is not ...}
    if "metadata_sha256" in metadata:
        metadata = sealed(metadata)
    path.write_text(json.dumps(metadata))


def record_checksum(prior: Path, name: str) -> None:
    """Make the metadata agree with a file a test has replaced, so that later checks see it."""
    digest = hashlib.sha256((prior / name).read_bytes()).hexdigest()
    edit_metadata(prior, files=read_json(prior / "run_metadata.json")["files"] | {name: digest})


def fail_at_step(monkeypatch, step: int, error: BaseException) -> None:
    """Let the network raise at the first forward of a step."""
    from diffsynth.models.wan_video_dit import WanModel

    calls, unpatchify = [], WanModel.unpatchify

    def forward(*args, **kwargs):
        calls.append(None)
        if len(calls) > 2 * step:
            raise error
        return unpatchify(*args, **kwargs)

    monkeypatch.setattr(WanModel, "unpatchify", forward)


def needed_name(prior: Path, name: str) -> str:
    """Return the name of a file that every clip of a prior needs; `context` stands for its prompt's."""
    return next(path.name for path in prior.glob("context_*.pt")) if name == "context" else name


def replace_pickle(path: Path, content: bytes) -> None:
    """Put another pickle into a file of torch.save's, which stays an archive like its own."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = next(name for name in entries if name.endswith("/data.pkl"))
    with zipfile.ZipFile(path, "w") as archive:
        for each, old in entries.items():
            archive.writestr(each, content if each == name else old)


def video_frames(path: Path) -> list:
    """Return all frames of a video."""
    import imageio

    with imageio.get_reader(path) as reader:
        return [frame for frame in reader]  # noqa: C416, its length is infinite


def assert_unfinished(prior: Path, infer, *, steps: int) -> None:
    """Assert that the folder says so itself, holds only whole files, and is refused."""
    metadata = read_json(prior / "run_metadata.json")
    assert metadata["status"] == "running"
    assert sum(name.startswith("step_") for name in metadata["files"]) == steps
    for name, digest in metadata["files"].items():
        assert hashlib.sha256((prior / name).read_bytes()).hexdigest() == digest
    before = listing(prior)
    outcome = infer(prior)
    assert outcome.code == 2
    assert f"unfinished ({steps} of 10 steps are whole)" in outcome.error
    assert listing(prior) == before


def fill_disk(disk: Path, monkeypatch, *, free_kib: int) -> None:
    """Leave so little space, and let the look before the run be told that all is well."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2**40))
    (disk / "others").write_bytes(bytes(2**20 - free_kib * 2**10))


def listing(folder: Path) -> dict[str, str]:
    """Every entry below a folder and a digest of what it holds."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*"))}


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"-> {path.readlink()}"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "not a file"


def metadata_with(*, sigmas: Sequence[float], **entries: Any) -> Metadata:
    """Return the metadata of a complete prior with this schedule and these entries."""
    known = {
        "format_version": 1,
        "status": "complete",
        "num_inference_steps": len(sigmas),
        "scheduler_sigmas": list(sigmas),
        "scheduler_timesteps": [1000 * sigma for sigma in sigmas],
        "denoising_strength": 1.0,
        "sigma_shift": 5.0,
        "height": 96,
        "width": 96,
        "num_frames": 17,
    }
    return Metadata.model_validate(known | entries)
