"""Collect what a page shows, as data: the clips of a folder with their records, by prior.

Nothing is trusted: the folder, its JSON files and the priors they name may come from an untrusted source.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from step_skip.errors import InputError
from step_skip.files.bounds import MAX_METADATA_BYTES
from step_skip.files.names import slug
from step_skip.files.reading import check_sha256, opened, read_file, sha256_file
from step_skip.files.writing import replacing, write_json
from step_skip.infer.schema import ClipReport, find_prior, parse_report, read_report
from step_skip.method.steps import is_late
from step_skip.page.posters import find_poster, kept_folder
from step_skip.prior.files import largest_file, recorded_sha256
from step_skip.prior.metadata import read_prior
from step_skip.prior.prior import OUTPUT_FILE
from step_skip.prior.schema import METADATA_FILE

ORDER_FILE = "order.json"
SETTINGS: Mapping[
    str, str
] = {  # in words; beside the prior where all its videos have the same, else under each
    "model": "model",
    "dtype": "precision",
    "device_name": "made on",
    "width": "width",
    "height": "height",
    "num_frames": "frames",
    "fps": "frames per second",
    "num_inference_steps": "steps of a full run",
    "sigma_shift": "schedule shift",
    "denoising_strength": "denoising strength",
    "seed": "seed",
    "cfg_scale": "guidance",
    "negative_prompt": "negative prompt",
    "skip_cache": "Skip-Cache",
    "tea_cache_l1_thresh": "TeaCache threshold",
    "lora": "LoRA",
}


@dataclass(frozen=True, kw_only=True)
class PageClip:
    """A clip, its record, and what is wrong with either."""

    path: Path
    report: ClipReport = field(default_factory=ClipReport)  # likewise of a prior, as far as it records it
    poster: Path | None = None  # none where the video can't be shown
    shape: tuple[int, int] = (1, 1)  # width and height of its frames
    problem: str | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether its JSON could be read."""
        return bool(self.report.model_fields_set)

    @property
    def steps(self) -> str:
        """The steps of a result in words, by which it finds its column."""
        if sigmas := self.report.sigmas:
            return "sigmas " + " ".join(f"{sigma:.4g}" for sigma in sigmas)
        if self.report.method == "resume":
            return f"after step {self.report.start_step}"
        return "steps " + " ".join(map(str, self.report.steps_run))

    @property
    def seconds(self) -> float | None:
        """What it took; None for an older prior, which doesn't record it."""
        seconds = self.report.seconds
        return None if seconds is None else sum(seconds.values())

    @property
    def cost(self) -> str:
        """Forwards and seconds in words; empty where they are unknown."""
        return "" if self.seconds is None else f"{self.report.forwards} forwards, {self.seconds:.1f} s"


@dataclass(frozen=True)
class Section:
    """A prior, or the priors that --nearest chose from, and the videos made from it: prompt x steps."""

    priors: Mapping[tuple[str, str], PageClip]  # by `prior_key`
    clips: Sequence[PageClip]

    @property
    def title(self) -> str:
        """What the prior is called; of several all their names."""
        return ", ".join(dict.fromkeys(clip.report.prior_run_id for clip in self.clips))

    @property
    def name(self) -> str:
        """A name for its page, another for every section."""
        return f"{slug(self.title)}_{section_digest(section_key(self.clips[0].report))}"

    @property
    def prompts(self) -> list[str]:
        """The rows, as they were asked for."""
        return list(dict.fromkeys(clip.report.prompt or "" for clip in self.clips))

    @property
    def columns(self) -> list[str]:
        """The columns: resumed by their start step, differential by their steps, then own sigmas."""
        return list(dict.fromkeys(clip.steps for clip in sorted(self.clips, key=column_order)))

    def prior_of(self, clip: PageClip) -> PageClip:
        """Return the prior that a clip follows."""
        return self.priors[prior_key(clip.report)]

    def is_late(self, clip: PageClip) -> bool:
        """Return whether a new prompt came in when the prior had settled most of its motion."""
        report = clip.report
        is_own = report.prompt == self.prior_of(clip).report.prompt
        if report.method == "differential" or is_own or report.start_step is None:
            return False
        return is_late(report.start_step, report.num_inference_steps)


def prior_title(prior: PageClip) -> str:
    """Return the title of a prior's own video."""
    prompt = prior.report.prompt  # an older prior records none
    return "prior" if prompt is None else f"prior: {prompt or 'no motion asked'}"


def column_order(clip: PageClip) -> tuple[bool, bool, int, int, list[int]]:
    """Return a sort key, see `Section.columns`."""
    start_step, steps = clip.report.start_step, clip.report.steps_run
    own_sigmas = bool(clip.report.sigmas)
    return own_sigmas, start_step is None, start_step or 0, len(steps), steps


def prior_key(report: ClipReport) -> tuple[str, str]:
    """Return a key that identifies the prior of a clip."""
    return report.prior_dir, report.prior_run_id


def section_key(report: ClipReport) -> tuple[str, ...]:
    """Return a key that clips of one prior, or of the same bank of priors, share."""
    return tuple(report.nearest_of) if report.nearest_of else prior_key(report)


def section_digest(key: tuple[str, ...]) -> str:
    """Return a part of a file name that differs for every key."""
    return hashlib.sha256(repr(key).encode(errors="backslashreplace")).hexdigest()[:8]


# --- reading ------------------------------------------------------------------------------------------------


def read_clips(folder: Path) -> dict[Path, PageClip]:
    """Read the clips in a folder, in their order, also those whose JSON can't be read.

    Raises:
        InputError: no folder, a prior, or no video in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name one that infer_from_prior.py wrote videos to")
    if (folder / METADATA_FILE).exists():
        raise InputError(f"{folder} is a prior; name the folder of a sweep, or the prior's outputs folder")
    paths = {path.with_suffix(".mp4") for path in folder.iterdir() if path.suffix in (".mp4", ".json")}
    clips = {path: clip for path in in_order(folder, paths) if (clip := read_page_clip(path)) is not None}
    if not clips:
        raise InputError(f"{folder} holds no video of infer_from_prior.py; name the folder of a sweep")
    return clips


def in_order(folder: Path, paths: Iterable[Path]) -> list[Path]:
    """Sort clips as they were asked for, if that is recorded, then by name."""
    indices = {str(name): index for index, name in enumerate(read_order(folder) or ())}
    return sorted(paths, key=lambda path: (indices.get(path.name, len(indices)), path))


def read_order(folder: Path) -> list[object] | None:
    """Read the recorded names of a folder's clips, in the order they were asked for; None: there are none."""
    order: object = None
    with contextlib.suppress(InputError, ValueError, RecursionError):
        order = json.loads(read_file(kept_folder(folder) / ORDER_FILE, most=MAX_METADATA_BYTES))
    names = order.get("videos") if isinstance(order, dict) else None
    return names if isinstance(names, list) else None


def keep_order(folder: Path, names: Sequence[str]) -> None:
    """Record the order in which a folder's videos were asked for."""
    kept_folder(folder).mkdir(parents=True, exist_ok=True)
    write_json(kept_folder(folder) / ORDER_FILE, {"videos": names})


def read_page_clip(path: Path) -> PageClip | None:
    """Read a clip from its .mp4 and the JSON beside it; None if there is only some other JSON."""
    try:
        report = read_report(path.with_suffix(".json"))
    except InputError as error:
        return look_at(path, problem=str(error)) if path.exists() else None
    return look_at(path, report=report)


def look_at(path: Path, *, report: ClipReport | None = None, problem: str | None = None) -> PageClip:
    """Return a clip with its poster, or with what is wrong with its .mp4."""
    report = report or ClipReport()
    try:
        poster, shape = find_poster(path, num_frames=report.num_frames)
    except InputError as error:
        return PageClip(path=path, report=report, problem=problem or str(error))
    return PageClip(path=path, report=report, poster=poster, shape=shape, problem=problem)


# --- priors -------------------------------------------------------------------------------------------------


def by_prior(
    folder: Path, clips: Iterable[PageClip], known: dict[tuple[str, str], PageClip]
) -> list[Section]:
    """Group clips into sections, each with the priors that they follow.

    Args:
        known: the priors that were looked at; those that were not are added.
    """
    sections: dict[tuple[str, ...], list[PageClip]] = {}
    for clip in clips:
        sections.setdefault(section_key(clip.report), []).append(clip)
        if (key := prior_key(clip.report)) not in known:
            known[key] = read_prior_clip(folder, clip)
    return [
        Section({prior_key(clip.report): known[prior_key(clip.report)] for clip in group}, group)
        for group in sections.values()
    ]


def read_prior_clip(folder: Path, of: PageClip) -> PageClip:
    """Read the own video of a clip's prior: the page's copy or, if there is none, the prior's."""
    name = f"prior_{slug(of.report.prior_run_id)}_{section_digest(prior_key(of.report))}.mp4"
    kept = kept_folder(folder) / name
    with contextlib.suppress(InputError):
        report = read_report(kept.with_suffix(".json"), required=["num_frames"])
        clip = look_at(kept, report=report)
        if clip.problem is None:
            return clip
    return keep_prior_clip(find_prior(of.report, of.path), kept)


def keep_prior_clip(directory: Path, kept: Path) -> PageClip:
    """Copy a prior's own video to the page, with what the page says of it, if it is the one it records."""
    path = directory / OUTPUT_FILE
    told: dict[str, Any] = {}
    try:
        prior = read_prior(directory)
        names = ("run_id", "prompt", "forwards", "seconds", *SETTINGS)
        recorded = prior.metadata.recorded()
        told = {name: recorded[name] for name in names if name in recorded}
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as temporary:
            with opened(path, most=largest_file(prior, OUTPUT_FILE)) as source, temporary.open("wb") as copy:
                shutil.copyfileobj(source, copy)
            if not prior.is_legacy:  # what it shows may be anybody's film
                check_sha256(path, sha256_file(temporary), recorded_sha256(prior, OUTPUT_FILE) or "")
        write_json(kept.with_suffix(".json"), told)
    except InputError as error:
        return PageClip(path=path, report=parse_report(told, OUTPUT_FILE, required=()), problem=str(error))
    clip = look_at(kept, report=parse_report(told, OUTPUT_FILE, required=()))
    if clip.poster is None:
        for each in (kept, kept.with_suffix(".json")):
            each.unlink()
    return clip
