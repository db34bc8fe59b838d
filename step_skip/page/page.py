"""Write the page of a sweep's folder, once or while its clips are made."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from step_skip.errors import InputError
from step_skip.files.reading import opened
from step_skip.files.writing import replacing
from step_skip.page.clips import (
    ORDER_FILE,
    PageClip,
    Section,
    by_prior,
    keep_order,
    read_clips,
    read_order,
    read_page_clip,
)
from step_skip.page.html import Running, escaped, page_html, relative_url, summarize
from step_skip.page.posters import kept_folder, save_poster
from step_skip.page.sheet import draw_sheet
from step_skip.prior.files import check_way

if TYPE_CHECKING:
    from PIL import Image

    OnMade = Callable[[Path, Sequence[Image.Image]], None]

log = logging.getLogger(__name__)

PAGE_FILE = "index.html"
SHEET_FILE = "contact_sheet.png"
SHEET_MARK = b"Software\0step_skip"  # in the contact sheets of this program
# in the pages of this program; the second, of earlier versions
PAGE_MARKS = (b'<meta name="generator" content="step_skip">', b'<body data-fps="')
MOST_ON_A_PAGE = 300  # videos; of more each prior has a page
MOST_ON_A_SHEET = 200  # videos; a picture of more could not be read
SHARE_OF_TIME = 0.05  # of a sweep's, at most, goes into pages that are written while it runs
PATIENCE = 20, 600.0  # so many times as long as a video took, or seconds, a page waits for the next


class SweepPage:
    """The page of a folder, kept up to date while its videos are made."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.clips: dict[Path, PageClip] = {}
        self.priors: dict[tuple[str, str], PageClip] = {}
        self.wait_until = 0.0
        self.last_video = time.monotonic()

    def read(self) -> None:
        """Look at the whole folder; see `read_clips`."""
        self.clips = read_clips(self.folder)

    def add(self, path: Path, frames: Sequence[Image.Image], *, expected: int) -> None:
        """Keep a new video's poster and bring the page up to date; what fails there fails no video."""
        try:
            save_poster(path, frames)
            self.update(path, expected=expected)
        except (OSError, InputError) as error:  # no reason to lose a video
            log.warning(f"the page is not up to date ({error})")

    def update(self, path: Path, *, expected: int) -> None:
        """Take a new video in, and write the page if the last time is long enough ago."""
        if self.clips:
            self.clips[path] = read_page_clip(path) or PageClip(path=path)
        else:  # those of an earlier run, too
            self.read()
        begin = time.monotonic()
        took, self.last_video = begin - self.last_video, begin
        if begin >= self.wait_until:
            times, least = PATIENCE
            self.write(Running(expected=expected, patience=max(least, times * took)))
            self.wait_until = time.monotonic() + (time.monotonic() - begin) / SHARE_OF_TIME

    def write(self, running: Running | None = None) -> None:
        """Write the page, or the index and the page of every prior; without `running` the sheet, too."""
        strays = [clip for clip in self.clips.values() if not clip.is_recorded]
        results = [clip for clip in self.clips.values() if clip.is_recorded]
        sections = by_prior(self.folder, results, self.priors)
        if running is None:
            write_sheet(self.folder, sections, strays)
        title, has_sheet = self.folder.resolve().name, (self.folder / SHEET_FILE).is_file()
        links = f'<a href="{SHEET_FILE}">First, middle and last frames</a>' if has_sheet else ""
        if len(self.clips) > MOST_ON_A_PAGE and len(sections) > 1:
            links += f"<ol>{''.join(self.write_section(section, running) for section in sections)}</ol>"
            sections = []
        page = page_html(
            self.folder,
            title=title,
            summary=summarize(results, running),
            sections=sections,
            strays=strays,
            links=links,
            running=running,
        )
        write_text(self.folder / PAGE_FILE, page)

    def write_section(self, section: Section, running: Running | None) -> str:
        """Write the page of a section, and return its line in the index."""
        path = kept_folder(self.folder) / f"{section.name}.html"
        back = f'<a href="{relative_url(self.folder / PAGE_FILE, path.parent)}">All priors</a>'
        page = page_html(
            path.parent,
            title=section.title,
            summary=summarize(section.clips),
            sections=[section],
            links=back,
            running=running,
        )
        write_text(path, page)
        link = relative_url(path, self.folder)
        return f'<li><a href="{link}">{escaped(section.title)}</a>, {len(section.clips)} videos</li>'


def write_page(folder: Path, order: Sequence[str] = ()) -> Path:
    """Write index.html and contact_sheet.png for the videos in a folder, and return the page.

    Videos and JSON files that are missing or damaged are named in their place.

    Args:
        folder: where infer_from_prior.py wrote videos, each with its JSON beside it.
        order: their names as they were asked for; none: as recorded, or by name.

    Raises:
        InputError: no folder, a prior, no video in it, or a link in a prior leads to it.
    """
    check_way(folder)
    if folder.is_dir():
        check_own_files(folder)
    if order:
        keep_order(folder, order)
    page = SweepPage(folder)
    page.read()
    page.write()
    return folder / PAGE_FILE


@contextlib.contextmanager
def running_page(folder: Path, order: Sequence[str]) -> Iterator[OnMade]:
    """Yield a function that brings the page up to date after a video; at the end the page is written whole.

    Args:
        order: the names of all videos that were asked for.
    """
    check_own_files(folder)
    keep_order(folder, order)
    page = SweepPage(folder)
    try:
        yield lambda path, frames: page.add(path, frames, expected=len(order))
    finally:
        with contextlib.suppress(InputError):  # nothing was made
            page.read()
        if page.clips:
            page.write()


def check_own_files(folder: Path) -> None:
    """Refuse a folder whose index.html or contact sheet this program did not write.

    A contact sheet of an earlier version has no mark, but it lies beside a page of ours.

    Raises:
        InputError: names the file.
    """
    page, sheet = folder / PAGE_FILE, folder / SHEET_FILE
    if os.path.lexists(page) and not any(mark in read_start(page) for mark in PAGE_MARKS):
        raise InputError(f"{page} exists and is no page of this program's; move it, or name another folder")
    if os.path.lexists(sheet) and not (os.path.lexists(page) or SHEET_MARK in read_start(sheet)):
        raise InputError(
            f"{sheet} exists and is no contact sheet of this program's; move it, or name another folder"
        )
    order = kept_folder(folder) / ORDER_FILE
    if os.path.lexists(order) and read_order(folder) is None:
        raise InputError(
            f"{order} exists and is none of this program's files; move it, or name another folder"
        )


def read_start(path: Path) -> bytes:
    """Read the first bytes of a file; none if it can't be read."""
    with contextlib.suppress(InputError), opened(path) as file:
        return file.read(2**16)
    return b""


def write_sheet(folder: Path, sections: Sequence[Section], strays: Sequence[PageClip]) -> None:
    """Write the contact sheet, where it can be read; else there is none."""
    from PIL.PngImagePlugin import PngInfo

    path = folder / SHEET_FILE
    if sum(len(section.clips) for section in sections) + len(strays) > MOST_ON_A_SHEET:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as temporary:
        mark = PngInfo()
        mark.add_text("Software", "step_skip")
        draw_sheet(sections, strays).save(temporary, pnginfo=mark)


def write_text(path: Path, text: str) -> None:
    """Write a page; half a character is shown as its escape."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
