"""Draw the README's picture of a sweep's page: make a sweep, open its page in Chromium, take a screenshot.

    python benchmarks/page_picture.py --output docs/sweep_page.png

Runs the scripts as a user does; needs chromium and chromedriver (`make browser`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from browser import open_browser, set_screen, show_frame, wait_until
from picture import run

PROMPTS = ("she moves to the left", "she comes closer", "she floats up")


def main() -> None:
    """Make the sweep in a temporary folder, then the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", type=Path, default=ROOT / "data" / "tiny_wan_i2v" / "inputs" / "mila.png")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--num_steps", nargs="+", default=["2", "3", "4"])
    parser.add_argument("--frame", type=int, default=12, help="the frame that is shown")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prior = run("generate_prior.py", "--model", "tiny", "--image", args.image, "--output_dir", folder)
        sweep = ("--prior_dir", prior, "--output_dir", Path(folder, "sweep"), "--prompt", *args.prompts)
        page = run("infer_from_prior.py", *sweep, "--num_steps", *args.num_steps) / "index.html"
        args.output.parent.mkdir(parents=True, exist_ok=True)
        take_screenshot(page, args.output, frame=args.frame, profile=Path(folder, "profile"))
    print(args.output)


def take_screenshot(page: Path, output: Path, *, frame: int, profile: Path) -> None:
    """The upper part of the page, all videos on the same frame, at half of its width, in few colours."""
    from PIL import Image

    browser = open_browser(profile)
    try:
        set_screen(browser, width=1120, height=1340)
        browser.get(page.as_uri())
        ready = "return near.size > 9 && [...near].every(isReady)"
        wait_until(browser, ready, message="the videos are not loaded")
        show_frame(browser, frame)
        wait_until(browser, ready, message="the frame is not shown")
        browser.save_screenshot(str(output))
    finally:
        browser.quit()
    with Image.open(output) as image:
        small = image.convert("RGB").resize((840, 1005), Image.Resampling.LANCZOS)
    small.quantize(128).save(output, optimize=True)


if __name__ == "__main__":
    main()
