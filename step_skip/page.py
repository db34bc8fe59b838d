"""Show the videos of a folder side by side: index.html, where they play in step, and contact_sheet.png.

    python step_skip.page prior_output/run_<id>/outputs

The folder is one that infer_from_prior.py wrote to: a sweep's, or a prior's outputs. The page has a section
per prior with a grid of prompt x steps; it links to the videos by relative paths and needs no server.
The last line on stdout is the page.
"""

from __future__ import annotations

import json
import os
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from step_skip.files import InputError, read_file, replacing
from step_skip.media import THUMB_HEIGHT, read_thumbs
from step_skip.metadata import MAX_METADATA_BYTES, read_prior
from step_skip.prior import METADATA_FILE, OUTPUT_FILE, check_files, check_way
from step_skip.schema import is_number
from step_skip.steps import is_late

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

PAGE_FILE = "index.html"
SHEET_FILE = "contact_sheet.png"
TEMPLATE = Path(__file__).with_name("page.html")
REPORT_KEYS: Mapping[str, Any] = {  # what the page needs of a result's JSON
    "prior_dir": str,
    "prior_run_id": str,
    "method": str,
    "start_step": (int, type(None)),
    "steps_run": list,
    "prompt": str,
    "num_inference_steps": int,
    "num_frames": int,
    "fps": (int, float),
    "forwards": int,
    "seconds": dict,
}
SETTINGS = (  # shown beside the prior where all its videos have the same, else under each
    "model",
    "dtype",
    "device_name",
    "width",
    "height",
    "num_frames",
    "fps",
    "num_inference_steps",
    "sigma_shift",
    "denoising_strength",
    "seed",
    "cfg_scale",
    "negative_prompt",
    "skip_cache",
    "tea_cache_l1_thresh",
    "lora",
)
NOTHING: tuple[object, ...] = (None, "", [])  # settings that were not used
LATE = "late for a new motion"
GAP, FONT_SIZE = 6, 13  # pixels of the contact sheet
LINE = FONT_SIZE + GAP


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A video, what is recorded of it, and what is wrong with either."""

    path: Path
    report: Mapping[str, Any] = field(default_factory=dict)  # a result's JSON or a prior's metadata
    thumbs: list[Image.Image] = field(default_factory=list)  # first, middle, last frame; none if unreadable
    problem: str | None = None

    @property
    def steps(self) -> str:
        """The steps of a result in words, by which it finds its column."""
        if sigmas := self.report.get("sigmas"):
            return "sigmas " + " ".join(f"{sigma:.4g}" for sigma in sigmas)
        if self.report["method"] == "resume":
            return f"after step {self.report['start_step']}"
        return "steps " + " ".join(map(str, self.report["steps_run"]))

    @property
    def cost(self) -> str:
        """Forwards and seconds in words; empty for an older prior, which records neither."""
        seconds = self.report.get("seconds")
        if not (isinstance(seconds, dict) and all(map(is_number, seconds.values()))):
            return ""
        return f"{self.report.get('forwards')} forwards, {sum(seconds.values()):.1f} s"


@dataclass(frozen=True)
class Section:
    """A prior and the videos made from it: a grid of prompt x steps."""

    prior: Clip
    clips: list[Clip]

    @property
    def run_id(self) -> str:
        return self.clips[0].report["prior_run_id"]

    @property
    def prior_title(self) -> str:
        """What the prior's own video shows."""
        prompt = self.prior.report.get("prompt")  # an older prior records none
        return "prior" if prompt is None else f"prior: {prompt or 'no motion asked'}"

    @property
    def prompts(self) -> list[str]:
        """The rows."""
        return sorted({clip.report["prompt"] for clip in self.clips})

    @property
    def columns(self) -> list[str]:
        """The columns: resumed by their start step, differential by their steps, then own sigmas."""
        return list(dict.fromkeys(clip.steps for clip in sorted(self.clips, key=column_order)))

    def cell(self, prompt: str, steps: str) -> list[Clip]:
        """The videos in one place; several where they differ in other settings."""
        return [clip for clip in self.clips if (clip.report["prompt"], clip.steps) == (prompt, steps)]

    def is_late(self, clip: Clip) -> bool:
        """Whether a new prompt came in when the prior had settled most of its motion."""
        report = clip.report
        if report["method"] == "differential" or report["prompt"] == self.prior.report.get("prompt"):
            return False
        return is_late(report["start_step"], report["num_inference_steps"])


def column_order(clip: Clip) -> tuple[bool, bool, int, list[int]]:
    """A sort key, see `Section.columns`."""
    start_step = clip.report["start_step"]
    own_sigmas = bool(clip.report.get("sigmas"))
    return own_sigmas, start_step is None, start_step or 0, clip.report["steps_run"]


# --- reading ------------------------------------------------------------------------------------------------


def read_folder(folder: Path) -> tuple[list[Section], list[Clip]]:
    """The results in a folder by prior, and the videos without a JSON that can be read.

    Raises:
        InputError: no folder, a prior, or no video in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name one that infer_from_prior.py wrote videos to")
    if (folder / METADATA_FILE).exists():
        raise InputError(f"{folder} is a prior; name the folder of a sweep, or the prior's outputs folder")
    paths = {path.with_suffix(".mp4") for path in folder.iterdir() if path.suffix in (".mp4", ".json")}
    clips = [clip for path in sorted(paths) if (clip := read_clip(path)) is not None]
    if not clips:
        raise InputError(f"{folder} holds no video of infer_from_prior.py; name the folder of a sweep")
    by_prior: dict[Path, list[Clip]] = {}
    for clip in clips:
        if clip.report:
            by_prior.setdefault(find_prior(folder, clip.report), []).append(clip)
    sections = [Section(read_prior_clip(directory), group) for directory, group in by_prior.items()]
    return sections, [clip for clip in clips if not clip.report]


def read_clip(path: Path) -> Clip | None:
    """A result from its video and the JSON beside it; None where there is neither, but another JSON."""
    try:
        report = read_report(path.with_suffix(".json"))
    except InputError as error:
        return look_at(path, problem=str(error)) if path.exists() else None
    return look_at(path, report=report)


def read_report(path: Path) -> dict[str, Any]:
    """A result's JSON.

    Raises:
        InputError: it is missing, no JSON, or lacks what the page needs.
    """
    if not path.is_file():
        raise InputError(f"{path.name} is missing")
    try:
        report = json.loads(read_file(path, most=MAX_METADATA_BYTES))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name} cannot be read ({error})") from error
    if not isinstance(report, dict):
        raise InputError(f"{path.name} is not a result's JSON")
    for key, kind in REPORT_KEYS.items():
        if not isinstance(report.get(key, ...), kind):
            raise InputError(f"{path.name} is not a result's JSON: {key} is missing or of another type")
    if not (all(map(is_number, [report["fps"], *report["steps_run"]])) and report["fps"] > 0):
        raise InputError(f"{path.name} was edited: fps or steps_run are no numbers")
    sigmas = report.get("sigmas") or []
    if not (isinstance(sigmas, list) and all(map(is_number, sigmas))):
        raise InputError(f"{path.name} was edited: sigmas are no numbers")
    if report["method"] != "differential" and report["start_step"] is None:
        raise InputError(f"{path.name} was edited: a resume without a start_step")
    return report


def find_prior(folder: Path, report: Mapping[str, Any]) -> Path:
    """The folder of a result's prior: one that holds the results, moved with them, or the one recorded."""
    recorded = Path(report["prior_dir"])
    for parent in folder.resolve().parents:
        if parent.name == recorded.name and (parent / METADATA_FILE).is_file():
            return parent
    return recorded


def read_prior_clip(directory: Path) -> Clip:
    """A prior's own video."""
    path = directory / OUTPUT_FILE
    report: Mapping[str, Any] = {}
    try:
        prior = read_prior(directory)
        report = prior.metadata
        check_files(prior, [] if prior.is_legacy else [OUTPUT_FILE])
    except InputError as error:  # what it shows may be anybody's film
        return Clip(path=path, report=report, problem=str(error))
    return look_at(path, report=report)


def look_at(path: Path, *, report: Mapping[str, Any] | None = None, problem: str | None = None) -> Clip:
    """A clip with what its video shows, or what is wrong with it."""
    report = report or {}
    try:
        thumbs = read_thumbs(path, num_frames=report.get("num_frames"))
    except InputError as error:
        return Clip(path=path, report=report, problem=problem or str(error))
    return Clip(path=path, report=report, thumbs=thumbs, problem=problem)


# --- the page -----------------------------------------------------------------------------------------------


def write_page(folder: Path) -> Path:
    """Write index.html and contact_sheet.png for the videos in a folder, and return the page.

    Videos and JSON files that are missing or damaged are named in their place.

    Args:
        folder: where infer_from_prior.py wrote videos, each with its JSON beside it.

    Raises:
        InputError: no folder, a prior, no video in it, or a link in a prior leads to it.
    """
    check_way(folder)
    sections, strays = read_folder(folder)
    with replacing(folder / SHEET_FILE) as temporary:
        draw_sheet(sections, strays).save(temporary)
    page = page_html(folder, sections, strays)
    with replacing(folder / PAGE_FILE) as temporary:  # half a character is shown as its escape
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    return folder / PAGE_FILE


def page_html(folder: Path, sections: list[Section], strays: list[Clip]) -> str:
    """The page. Every text from a file is escaped by `escaped` or `relative_url` where it is put in."""
    clips = [clip for section in sections for clip in section.clips]
    parts = [section_html(folder, section) for section in sections]
    if strays:
        figures = "".join(figure_html(folder, clip, title=clip.path.name) for clip in strays)
        parts.append(f'<section><h2>Without a JSON file</h2><div class="strays">{figures}</div></section>')
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escaped(folder.resolve().name),
        count=len(clips),
        forwards=sum(clip.report["forwards"] for clip in clips),
        sheet=SHEET_FILE,
        fps=max((clip.report["fps"] for clip in clips), default=16),
        sections="\n".join(parts),
    )


def section_html(folder: Path, section: Section) -> str:
    """A prior, its video and settings, then the grid."""
    reports = [clip.report for clip in (section.prior, *section.clips) if clip.report]
    shared = {key: reports[0].get(key) for key in SETTINGS if len({repr(r.get(key)) for r in reports}) == 1}
    varying = [key for key in SETTINGS if key not in shared]
    prior = figure_html(folder, section.prior, title=section.prior_title, keys=varying)
    pairs = (
        f"<div><dt>{key}</dt> <dd><bdi>{escaped(value)}</bdi></dd></div>"
        for key, value in shared.items()
        if value not in NOTHING
    )
    rows = []
    for number, prompt in enumerate(section.prompts, 1):
        cells = (cell_html(folder, section, section.cell(prompt, each), varying) for each in section.columns)
        rows.append(f"<tr><th scope=row dir=auto>{number}. {escaped(prompt)}</th>{''.join(cells)}</tr>\n")
    return f"""<section>
<h2 dir=auto>{escaped(section.run_id)}</h2>
<div class="prior">{prior}<dl>{"".join(pairs)}</dl></div>
<div class="grid"><table>
{"".join(rows)}</table></div>
</section>"""


def cell_html(folder: Path, section: Section, clips: Iterable[Clip], keys: Iterable[str]) -> str:
    """A cell of the grid, empty where no video is."""
    figures = (
        figure_html(folder, clip, title=clip.steps, keys=keys, is_late=section.is_late(clip))
        for clip in clips
    )
    return f"<td>{''.join(figures)}</td>"


def figure_html(
    folder: Path, clip: Clip, *, title: str, keys: Iterable[str] = (), is_late: bool = False
) -> str:
    """A video with what it cost and the settings in which it differs from others, or what is wrong."""
    problem = f'<p class="problem" dir=auto>{escaped(clip.problem)}</p>' if clip.problem else ""
    settings = ((key, clip.report.get(key)) for key in keys)
    notes = [clip.cost, *(f"{key} {value}" for key, value in settings if value not in NOTHING)]
    details = "".join(f"<br>{escaped(note)}" for note in notes if note)
    late = f'<br><span class="late">{LATE}</span>' if is_late else ""
    return f"""<figure>{video_html(folder, clip)}{problem}
<figcaption dir=auto><b>{escaped(title)}</b>{late}{details}</figcaption></figure>"""


def video_html(folder: Path, clip: Clip) -> str:
    """The video, where there is one to play."""
    if not clip.thumbs:
        return ""
    width, height = clip.thumbs[0].size  # their ratio keeps the place until the video is there
    place = f'data-src="{relative_url(clip.path, folder)}" width="{width}" height="{height}"'
    return f'<video {place} muted playsinline preload="auto"></video>'


def escaped(value: object) -> str:
    """Any value as text that is no markup, between tags or between quotes."""
    return escape(str(value))


def relative_url(path: Path, folder: Path) -> str:
    """The relative link from a page in `folder`; no name is taken for markup, a scheme or an escape."""
    relative = os.path.relpath(path.parent.resolve() / path.name, folder.resolve())
    return quote(Path(relative).as_posix(), errors="surrogateescape")


# --- the contact sheet --------------------------------------------------------------------------------------


def draw_sheet(sections: list[Section], strays: list[Clip]) -> Image.Image:
    """First, middle and last frame of every video, in the order of the page."""
    from PIL import Image, ImageDraw, ImageFont

    rows = sheet_rows(sections, strays)
    clips = [clip for _, tiles in rows for _, clip in tiles if clip is not None]
    tile_width = max([3 * THUMB_HEIGHT, *(sum(thumb.width for thumb in clip.thumbs) for clip in clips)])
    columns = max(len(tiles) for _, tiles in rows)
    row_height = 2 * LINE + THUMB_HEIGHT + GAP
    size = GAP + columns * (tile_width + GAP), GAP + len(rows) * row_height
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for row, (label, tiles) in enumerate(rows):
        top = GAP + row * row_height
        pen.text((GAP, top), fit(label, font, size[0] - 2 * GAP), fill="black", font=font)
        for column, (caption, clip) in enumerate(tiles):
            if clip is not None:
                place = GAP + column * (tile_width + GAP), top + LINE
                draw_tile(sheet, pen, place, caption, clip, font=font, width=tile_width)
    return sheet


def sheet_rows(
    sections: list[Section], strays: list[Clip]
) -> list[tuple[str, list[tuple[str, Clip | None]]]]:
    """Labelled rows of clips with their captions; None where the grid has a gap."""
    rows: list[tuple[str, list[tuple[str, Clip | None]]]] = []
    for section in sections:
        rows.append((f"{section.run_id}, {section.prior_title}", [(section.prior.cost, section.prior)]))
        for number, prompt in enumerate(section.prompts, 1):
            tiles: list[tuple[str, Clip | None]] = []
            for steps in section.columns:
                clips = section.cell(prompt, steps)
                tiles += [(sheet_caption(section, clip), clip) for clip in clips] or [("", None)]
            rows.append((f"{number}. {prompt}", tiles))
    if strays:
        rows.append(("without a JSON file", [(clip.path.name, clip) for clip in strays]))
    return rows


def sheet_caption(section: Section, clip: Clip) -> str:
    """Steps and cost on one line."""
    return ", ".join(filter(None, (clip.steps, clip.cost, "late" if section.is_late(clip) else "")))


def draw_tile(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    place: tuple[int, int],
    caption: str,
    clip: Clip,
    *,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    width: int,
) -> None:
    """One video at `place`, its upper left corner: the caption, then three frames or what is wrong."""
    left, top = place
    pen.text((left, top), fit(caption, font, width), fill="black", font=font)
    if clip.problem:
        pen.text((left, top + LINE), fit(clip.problem, font, width), fill="#9a4b00", font=font)
    for thumb in clip.thumbs:
        sheet.paste(thumb, (left, top + LINE))
        left += thumb.width


def fit(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The label on one line of at most `width` pixels, cut off where it is longer."""
    label = " ".join(label[: width // 2].encode(errors="replace").decode().split())
    if font.getlength(label) <= width:
        return label
    while font.getlength(label + "...") > width:
        label = label[:-1]
    return label + "..."


def main(argv: list[str] | None = None) -> Path:
    """Write the page of the folder on the command line and return its path."""
    from step_skip.cli import Parser, utf8_path

    parser = Parser(__doc__)
    parser.add_argument("folder", type=utf8_path, help="where the videos and their JSON files are")
    return write_page(parser.parse_args(argv).folder)


if __name__ == "__main__":
    from step_skip.cli import run_script

    run_script(main)
