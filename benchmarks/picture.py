"""Draw the README's moving picture: one identity, its prior and new prompts made from it, side by side.

    python benchmarks/picture.py --output docs/prior_and_prompts.webp

Runs the two scripts as a user does and reads the frames back from the videos they made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
PRIOR_PROMPT = "she stays still"
PROMPTS = ("she moves to the left", "she comes closer", "she speaks")
GAP, LABEL = 6, 210  # pixels
CAPTION = 46  # pixels, two lines
HOLD = 700  # ms that the last frame stays before the loop begins again


def run(script: str, *flags: object) -> Path:
    """Run one of the scripts; its last line of stdout is the path it made."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.splitlines()[-1])


def enlarged(video: Path, *, zoom: float) -> list[Image.Image]:
    """All frames of a video."""
    import imageio.v3 as iio

    frames = iio.imread(video)
    size = (round(frames.shape[2] * zoom), round(frames.shape[1] * zoom))
    return [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in frames]


def draw(rows: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Rows of frames with their labels on the left."""
    width, height = rows[0][1][0].size
    sheet = Image.new("RGB", (LABEL + len(rows[0][1]) * (width + GAP), len(rows) * (height + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for row, (label, frames) in enumerate(rows):
        top = row * (height + GAP)
        pen.multiline_text((4, top + height // 2 - 28), label, fill="black", font=font)
        for column, frame in enumerate(frames):
            sheet.paste(frame, (LABEL + column * (width + GAP), top))
    return sheet


def draw_side_by_side(captions: Sequence[str], frames: Sequence[Image.Image]) -> Image.Image:
    """One moment of every clip, each with its caption below."""
    width, height = frames[0].size
    sheet = Image.new("RGB", (len(frames) * (width + GAP) - GAP, height + CAPTION), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, (caption, frame) in enumerate(zip(captions, frames, strict=True)):
        left = column * (width + GAP)
        sheet.paste(frame, (left, 0))
        middle = (left + width // 2, height + CAPTION // 2)
        pen.multiline_text(middle, caption, fill="black", font=font, anchor="mm", align="center")
    return sheet


def save_loop(sheets: list[Image.Image], output: Path, *, fps: float) -> None:
    """An animated WebP or GIF, by the name's ending, that runs for ever."""
    durations = [round(1000 / fps)] * (len(sheets) - 1) + [HOLD]
    options = {"quality": 90, "method": 6} if output.suffix == ".webp" else {}
    first, *others = sheets
    first.save(output, save_all=True, append_images=others, duration=durations, loop=0, **options)


def main() -> None:
    """Make the prior and the clips in a temporary folder, then the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", type=Path, default=ROOT / "data" / "tiny_wan_i2v" / "inputs" / "mila.png")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument(
        "--flags", nargs="*", default=[], help="more flags for infer_from_prior.py, without --"
    )
    parser.add_argument("--zoom", type=float, default=2.0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = ("--model", "tiny", "--image", args.image, "--prompt", PRIOR_PROMPT, "--output_dir", folder)
        prior = run("generate_prior.py", *made)
        metadata = json.loads((prior / "run_metadata.json").read_text())
        captions = [f'prior: "{PRIOR_PROMPT}"\n{metadata["forwards"]} forwards']
        clips = [enlarged(prior / "output_full.mp4", zoom=args.zoom)]
        for prompt in args.prompts:
            video = run("infer_from_prior.py", "--prior_dir", prior, "--prompt", prompt, *args.flags)
            forwards = json.loads(video.with_suffix(".json").read_text())["forwards"]
            captions.append(f'"{prompt}"\n{forwards} forwards')
            clips.append(enlarged(video, zoom=args.zoom))
    sheets = [draw_side_by_side(captions, frames) for frames in zip(*clips, strict=True)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_loop(sheets, args.output, fps=metadata["fps"])
    print(args.output)


if __name__ == "__main__":
    main()
