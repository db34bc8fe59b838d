"""The page as HTML: every text from a file is escaped where it is put in, and only our own script runs.

The policy in the page's head names the style and the script by their SHA-256; page.html, page.css and page.js
beside this file are what it is made of.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shlex
import string
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from urllib.parse import quote

from step_skip.infer.measures import describe_measures
from step_skip.infer.report import COMMAND_FLAGS
from step_skip.infer.schema import ClipReport
from step_skip.infer.steps import more_steps
from step_skip.models.lora import RecordedLora, summarize_loras
from step_skip.page.clips import SETTINGS, PageClip, Section, prior_title

NOTHING: tuple[object, ...] = (None, "", [])  # settings that were not used
PATH_FLAGS = {"--prior_dir", "--model_dir", "--image", "--lora"}
LATE_NOTE = "late for a new motion"
SORTS: Mapping[str, str] = {  # what a page can be sorted by, where it is known
    "predicted_closeness": "predicted closeness",
    "identity": "identity",
    "movement": "movement",
    "flicker": "flicker",
    "forwards": "forwards",
    "seconds": "seconds",
}


@dataclass(frozen=True, kw_only=True)
class Running:
    """A sweep that goes on: its page reloads itself."""

    expected: int  # videos
    patience: float  # seconds after which a page that didn't change is no longer waited for


def page_html(
    base: Path,
    *,
    title: str,
    summary: str,
    sections: Sequence[Section] = (),
    strays: Sequence[PageClip] = (),
    links: str = "",
    running: Running | None = None,
) -> str:
    """Return the HTML of a page in the folder `base`.

    Args:
        strays: videos without a JSON.
        links: HTML, before the sections.
    """
    clips = [clip for section in sections for clip in section.clips]
    parts = [section_html(base, section) for section in sections]
    if strays:
        figures = "".join(figure_html(base, clip, title=clip.path.name) for clip in strays)
        parts.append(f'<section><h2>Without a JSON file</h2><div class="cards">{figures}</div></section>')
    style, script = asset("page.css"), asset("page.js")
    return string.Template(asset("page.html")).substitute(
        title=escaped(title),
        summary=summary,
        links=links,
        fps=max((clip.report.fps or 16 for clip in clips), default=16),
        running="" if running is None else f' data-until="{time.time() + running.patience:.0f}"',
        sorts="".join(f"<option value={key}>{SORTS[key]}</option>" for key in known_sorts(clips)),
        sections="\n".join(parts),
        style=style,
        style_hash=csp_hash(style),
        script=script,
        script_hash=csp_hash(script),
    )


def summarize(clips: Sequence[PageClip], running: Running | None = None) -> str:
    """Summarize how many clips there are, and what they cost."""
    progress = f" of {running.expected} so far" if running else ""
    return f"{len(clips)} videos{progress}, {sum(clip.report.forwards for clip in clips)} forwards."


@cache
def asset(name: str) -> str:
    """Return the content of one of the page's files beside this module."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def csp_hash(text: str) -> str:
    """Return the hash by which the page's content security policy allows a script or a style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def known_sorts(clips: Iterable[PageClip]) -> list[str]:
    """Return the sort keys for which at least one clip has a number."""
    return [key for key in SORTS if any(sort_value(clip, key) is not None for clip in clips)]


def sort_value(clip: PageClip, key: str) -> float | None:
    """Return the number that a clip is sorted by; None: it isn't known."""
    return clip.seconds if key == "seconds" else getattr(clip.report, key)


# --- sections -----------------------------------------------------------------------------------------------


def section_html(base: Path, section: Section) -> str:
    """Return the priors, their settings, then the grid of prompt x steps; cards if there is one column."""
    reports = [clip.report for clip in (*section.priors.values(), *section.clips) if clip.is_recorded]
    varying = varying_settings(reports)
    priors = "".join(
        figure_html(base, prior, title=prior_title(prior), keys=varying, name=run_id)
        for (_, run_id), prior in section.priors.items()
    )
    pairs = "".join(
        f"<div><dt>{label}</dt> <dd><bdi>{escaped(words)}</bdi></dd></div>"
        for label, words in shown_settings(reports[0]).items()
        if label not in varying
    )
    return f"""<section>
<h2 dir=auto>{escaped(section.title)}</h2>
<div class="prior">{priors}<dl>{pairs}</dl></div>
{grid_html(base, section, varying)}
</section>"""


def grid_html(base: Path, section: Section, keys: Sequence[str]) -> str:
    """The videos of a section; those of one cell differ in other settings."""
    columns = section.columns
    cells: dict[tuple[str, str], list[str]] = {}
    for clip in section.clips:
        figure = clip_html(base, section, clip, keys)
        cells.setdefault((clip.report.prompt or "", clip.steps), []).append(figure)
    if len(columns) == 1:
        figures = "".join("".join(cells[prompt, columns[0]]) for prompt in section.prompts)
        return f'<div class="cards named">{figures}</div>'
    rows = []
    for number, prompt in enumerate(section.prompts, 1):
        row = "".join(f"<td>{''.join(cells.get((prompt, steps), []))}</td>" for steps in columns)
        rows.append(f"<tr><th scope=row dir=auto>{number}. {escaped(prompt)}</th>{row}</tr>\n")
    region = '<div class="grid" tabindex=0 role=region aria-label="prompts and steps">'
    return f"{region}<table>\n{''.join(rows)}</table></div>"


def clip_html(base: Path, section: Section, clip: PageClip, keys: Iterable[str]) -> str:
    """Return the HTML of a clip; among several priors it names the one that it followed."""
    notes = [LATE_NOTE] if section.is_late(clip) else []
    if len(section.priors) > 1:
        prior = section.prior_of(clip)
        said = prior.report.prompt
        run_id = clip.report.prior_run_id
        notes.append(f"follows {run_id}" + (f": {said}" if said else ""))
    return figure_html(
        base, clip, title=clip.steps, keys=keys, name=clip.report.prompt or "", notes=notes, is_result=True
    )


def figure_html(
    base: Path,
    clip: PageClip,
    *,
    title: str,
    name: str = "",
    keys: Iterable[str] = (),
    notes: Sequence[str] = (),
    is_result: bool = False,
) -> str:
    """Return the HTML of a clip with its cost and the settings in which it differs, or with its problem."""
    problem = f'<p class="problem" dir=auto>{escaped(clip.problem)}</p>' if clip.problem else ""
    settings = shown_settings(clip.report)
    told = [
        *(
            f'<span class="late">{escaped(note)}</span>' if note == LATE_NOTE else escaped(note)
            for note in notes
        ),
        escaped(clip.cost),
        *(escaped(f"{key} {settings[key]}") for key in keys if key in settings),
        measures_html(clip.report),
    ]
    details = "".join(f"<br>{each}" for each in told if each)
    heading = f'<b class="name">{escaped(name)}</b>' if is_result else ""
    data = data_of(base, clip, name=name, title=title) if is_result else ""
    return f"""<figure{data}>{video_html(base, clip, label=f"{name}, {title}" if name else title)}{problem}
<figcaption dir=auto>{heading}<b class="steps">{escaped(title)}</b>{details}</figcaption></figure>"""


def measures_html(report: ClipReport) -> str:
    """Return the HTML of a clip's measures; no measure is broken over two lines."""
    told = escaped(", ".join(describe_measures(report.recorded())))
    unbroken = told.replace(", ", ",</span> <span>")
    return f'<span class="measures"><span>{unbroken}</span></span>' if told else ""


def data_of(base: Path, clip: PageClip, *, name: str, title: str) -> str:
    """Return what the script needs of a clip, as attributes."""
    again = command_to_copy(clip)
    values = {
        "result": clip.path.name,
        "json": relative_url(clip.path.with_suffix(".json"), base),
        "command": again,
        "more": again and with_more_steps(again, clip.report),
        **{key: sort_value(clip, key) for key in SORTS},
    }
    return "".join(f' data-{key}="{escaped(value)}"' for key, value in values.items() if value not in NOTHING)


def video_html(base: Path, clip: PageClip, *, label: str) -> str:
    """Return the HTML of a video over its poster; without scripts it is a link."""
    if clip.poster is None:
        return ""
    width, height = clip.shape  # their ratio keeps the place until the video is there
    url, poster = relative_url(clip.path, base), relative_url(clip.poster, base)
    place = f'data-src="{url}" width="{width}" height="{height}"'
    return f"""<a class="frame" href="{url}" aria-label="{escaped(label)}">
<img src="{poster}" alt="" loading="lazy"><video {place} muted playsinline preload="auto"></video></a>"""


# --- words --------------------------------------------------------------------------------------------------


def shown_settings(report: ClipReport) -> dict[str, str]:
    """Return the settings of a clip or a prior as text, by their labels."""
    told = {
        label: in_words(getattr(report, key))
        for key, label in SETTINGS.items()
        if getattr(report, key) not in NOTHING and (key, getattr(report, key)) != ("denoising_strength", 1)
    }
    told |= (
        {"size": f"{told.pop('width')} x {told.pop('height')}"} if {"width", "height"} <= told.keys() else {}
    )
    if report.num_frames and report.fps:
        told["length"] = f"{report.num_frames / report.fps:.1f} s"
    return told


def varying_settings(reports: Sequence[ClipReport]) -> list[str]:
    """Return the labels of the settings in which reports differ."""
    told = [shown_settings(report) for report in reports]
    labels = dict.fromkeys(label for each in told for label in each)
    return [label for label in labels if len({each.get(label) for each in told}) > 1]


def in_words(value: object) -> str:
    """Return the value of a setting as text."""
    if isinstance(value, list) and value and isinstance(value[0], RecordedLora):
        return summarize_loras(value)
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def command_to_copy(clip: PageClip) -> str | None:
    """Return the command line that makes a clip again, quoted anew; None unless it is one of our script."""
    try:
        words = shlex.split(clip.report.command)
    except ValueError:
        return None
    own = words[:2] == ["python", "infer_from_prior.py"] and all(word.isprintable() for word in words)
    flags = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
    return shlex.join(words) if own and flags <= COMMAND_FLAGS and not names_share(words) else None


def names_share(words: Iterable[str]) -> bool:
    """Return whether a command line names a path on another machine's share, as Windows writes them."""
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag, _, word = word.partition("=")
        path = word.removeprefix("high=").removeprefix("low=")
        if flag in PATH_FLAGS and path.startswith(("//", "\\\\")):
            return True
    return False


def with_more_steps(command: str, report: ClipReport) -> str | None:
    """Return the command line with more steps; None: there are no more, or each has its own guidance."""
    words, more = shlex.split(command), more_steps(report)
    flag = {"differential": "--steps", "resume": "--start_step"}.get(report.method or "")
    if more is None or flag not in words or isinstance(report.cfg_scale, list):
        return None
    begin = words.index(flag)
    end = begin + 1
    while end < len(words) and not words[end].startswith("--"):
        end += 1
    new = [word for name, value in more.items() for word in (f"--{name}", str(value))]
    return shlex.join([*words[:begin], *new, *words[end:]])


def differences(clip: PageClip, others: Iterable[PageClip]) -> list[str]:
    """Return the settings in which a clip differs from any of the others, as text."""
    settings = shown_settings(clip.report)
    varying = varying_settings([each.report for each in others])
    return [f"{key} {settings[key]}" for key in varying if key in settings]


def escaped(value: object) -> str:
    """Return a value as text that is no markup, between tags or between quotes."""
    return escape(str(value))


def relative_url(path: Path, base: Path) -> str:
    """Return the relative link from a page in `base`; no name is taken for markup, a scheme or an escape."""
    relative = os.path.relpath(path.parent.resolve() / path.name, base.resolve())
    return quote(Path(relative).as_posix(), errors="surrogateescape")
