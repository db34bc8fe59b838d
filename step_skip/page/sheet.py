"""contact_sheet.png: first, middle and last frame of every video, in the order of the page."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from step_skip.page.clips import PageClip, Section, prior_title
from step_skip.page.html import LATE_NOTE, differences
from step_skip.page.posters import read_frames

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

GAP, FONT_SIZE = 6, 13  # pixels
LINE = FONT_SIZE + GAP
FRAME_HEIGHT = 96  # pixels
# where Pillow's own font lacks a letter; Debian's, Windows' and macOS's
MORE_FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "YuGothM.ttc", "msyh.ttc", "PingFang.ttc")
Row = tuple[str, list[tuple[str, PageClip | None]]]  # a label, then clips with their captions; None: a gap


def draw_sheet(sections: Sequence[Section], strays: Sequence[PageClip]) -> Image.Image:
    """Draw the whole sheet: a row per prior, then one per prompt."""
    from PIL import Image, ImageDraw

    rows = sheet_rows(sections, strays)
    frames = {id(clip): frames_of(clip) for _, tiles in rows for _, clip in tiles if clip is not None}
    tile_width = max(3 * FRAME_HEIGHT, *(sum(frame.width for frame in each) for each in frames.values()))
    columns = max(len(tiles) for _, tiles in rows)
    row_height = 2 * LINE + FRAME_HEIGHT + GAP
    size = GAP + columns * (tile_width + GAP), GAP + len(rows) * row_height
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for row, (label, tiles) in enumerate(rows):
        top = GAP + row * row_height
        write(pen, (GAP, top), label, width=size[0] - 2 * GAP)
        for column, (caption, clip) in enumerate(tiles):
            if clip is None:
                continue
            left = GAP + column * (tile_width + GAP)
            write(pen, (left, top + LINE), caption, width=tile_width)
            if clip.problem:
                write(pen, (left, top + 2 * LINE), clip.problem, width=tile_width, fill="#9a4b00")
            for frame in frames[id(clip)]:
                sheet.paste(frame, (left, top + 2 * LINE))
                left += frame.width
    return sheet


def frames_of(clip: PageClip) -> list[Image.Image]:
    """Return the three frames of a clip; none if it can't be shown."""
    if clip.poster is not None:
        with contextlib.suppress(OSError):  # gone, or half of it
            return read_frames(clip.poster, height=FRAME_HEIGHT)
    return []


def sheet_rows(sections: Sequence[Section], strays: Sequence[PageClip]) -> list[Row]:
    """Return the rows of the page."""
    rows: list[Row] = []
    for section in sections:
        for (_, run_id), prior in section.priors.items():
            rows.append((f"{run_id}, {prior_title(prior)}", [(prior.cost, prior)]))
        cells: dict[tuple[str, str], list[PageClip]] = {}
        for clip in section.clips:
            cells.setdefault((clip.report.prompt or "", clip.steps), []).append(clip)
        for number, prompt in enumerate(section.prompts, 1):
            tiles: list[tuple[str, PageClip | None]] = []
            for steps in section.columns:
                clips = cells.get((prompt, steps), [])
                tiles += [(caption_of(section, clip, clips), clip) for clip in clips] or [("", None)]
            rows.append((f"{number}. {prompt}", tiles))
    if strays:
        rows.append(("without a JSON file", [(clip.path.name, clip) for clip in strays]))
    return rows


def caption_of(section: Section, clip: PageClip, cell: Sequence[PageClip]) -> str:
    """Return a caption of one line: steps, the settings that differ within the cell, and cost."""
    late = LATE_NOTE.split()[0] if section.is_late(clip) else ""
    return ", ".join(filter(None, (clip.steps, *differences(clip, cell), late, clip.cost)))


# --- letters ------------------------------------------------------------------------------------------------


def write(
    pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, *, width: int, fill: str = "black"
) -> None:
    """Write a text on one line of at most `width` pixels, cut off where it is longer."""
    text = " ".join(text[: width // 2].encode(errors="replace").decode().split())
    font, text = font_for(text)
    if font.getlength(text) > width:
        while font.getlength(text + "...") > width:
            text = text[:-1]
        text += "..."
    pen.text(place, text, fill=fill, font=font)


def font_for(text: str) -> tuple[Any, str]:
    """Return a font that has every letter of a text, else Pillow's own and "?" for the letters it lacks."""
    from PIL import ImageFont

    own = ImageFont.load_default(FONT_SIZE)
    lacking = lacks(own, text)
    for name in MORE_FONTS if lacking else ():
        with contextlib.suppress(OSError):
            font = ImageFont.truetype(name, FONT_SIZE)
            if not lacks(font, text):
                return font, text
    return own, "".join("?" if letter in lacking else letter for letter in text)


def lacks(font: Any, text: str) -> set[str]:
    """Return the letters for which a font shows the box of a missing letter."""
    box = bytes(font.getmask("\U0010ffff"))
    return {letter for letter in set(text) if letter != " " and bytes(font.getmask(letter)) == box}
