"""What the tests share: command lines run in process, as a user runs them, and what a refusal looks like."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_skip.cli.terminal import run_script
from step_skip.prior.metadata import sealed

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


def listing(folder: Path) -> dict[str, str]:
    """Every entry below a folder and a digest of what it holds."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*"))}


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"-> {path.readlink()}"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "not a file"
