"""Draw the README's picture: one identity, its prior and new prompts resumed from it, frames side by side.

    python benchmarks/picture.py --output docs/prior_and_prompts.png

Runs the two scripts as a user does and reads the frames back from the videos they made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
PRIOR_PROMPT = "she stays still"
PROMPTS = ("she moves to the left", "she floats up", "she comes closer", "she speaks")
FRAMES = (0, 3, 6, 9, 12, 16)
GAP, LABEL = 6, 210  # pixels


def run(script: str, *flags: object) -> Path:
    """Run one of the scripts; its last line of stdout is the path it made."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.splitlines()[-1])


def strip(video: Path, *, zoom: float) -> list[Image.Image]:
    """A few frames of a video, enlarged."""
    import imageio.v3 as iio

    frames = iio.imread(video)
    size = (round(frames.shape[2] * zoom), round(frames.shape[1] * zoom))
    return [Image.fromarray(frames[i]).resize(size, Image.Resampling.LANCZOS) for i in FRAMES]


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
    parser.add_argument("--zoom", type=float, default=1.0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = ("--model", "tiny", "--image", args.image, "--prompt", PRIOR_PROMPT, "--output_dir", folder)
        prior = run("generate_prior.py", *made)
        forwards = json.loads((prior / "run_metadata.json").read_text())["forwards"]
        label = f'the prior:\n"{PRIOR_PROMPT}"\n{forwards} forwards'
        rows = [(label, strip(prior / "output_full.mp4", zoom=args.zoom))]
        for prompt in args.prompts:
            video = run("infer_from_prior.py", "--prior_dir", prior, "--prompt", prompt, *args.flags)
            forwards = json.loads(video.with_suffix(".json").read_text())["forwards"]
            rows.append((f'"{prompt}"\n{forwards} forwards', strip(video, zoom=args.zoom)))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        draw(rows).save(args.output, optimize=True)
    print(args.output)


if __name__ == "__main__":
    main()
