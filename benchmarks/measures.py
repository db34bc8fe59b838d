"""How far the measures of a clip (step_skip/measures.py) agree with the truth, and what more steps mend.

    python benchmarks/measures.py --output benchmarks/results/measures.json
    python benchmarks/measures.py --cost --output benchmarks/results/measures_cost.json

Identities that the embedded model has not seen; of each a prior that holds still, and two other motions in
1, 2, 4 and all 10 steps and resumed late, at the model's own guidance, at Wan's, or at one that is too
strong, so that some come out and some don't. The truth is the drawn world's: how far the character that is
shown is from the one it should be, how far it moved and how it flickers; and the PSNR to the
clip of all steps. Rank correlations (Spearman) over all clips, and with what a motion's clips have in common
taken out. CPU, float32; about ten minutes. --cost measures 81 frames of 832 x 480 pixels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "tiny_wan_i2v")]

import world
from evaluate import psnr
from PIL import Image
from scipy.stats import rankdata, spearmanr

from step_skip import Prior, generate_prior, infer_from_prior, load
from step_skip.infer.measures import measure_frames
from step_skip.models.loading import Model

MOTIONS = ("left", "closer", "up", "speak", "tilt", "away", "sleep")
GUIDANCE = (2.0, 5.0, 8.0)
NUM_STEPS = (1, 2, 4, 10)
SEED = 20_261
PAIRS = (  # a measure, and what it should tell; the sign says whether both grow together
    ("identity", "identity_error", -1),
    ("movement", "true_movement", 1),
    ("flicker", "true_flicker", 1),
    ("predicted_closeness", "closeness", 1),
)
Row = dict[str, Any]


# --- the truth ----------------------------------------------------------------------------------------------


def measure_truth(frames: np.ndarray, identity: world.Identity) -> Row:
    """What the drawn world knows of a clip. frames: uint8 [T, H, W, 3]"""
    shown = world.measure(frames, identity)
    return {
        "shown": shown.motion,
        "identity_error": shown.identity_error,
        "true_movement": movement(shown.pose, identity),
        "true_flicker": flicker(frames, identity),
    }


def movement(pose: np.ndarray, identity: world.Identity) -> float:
    """How far the head's rim moved over the clip, in pixels: shift, and what zoom and tilt do there."""
    steps = np.diff(pose, axis=0, prepend=np.zeros((1, pose.shape[1])))
    return float(np.sqrt((steps[:, :2] ** 2).sum(1) + identity.radius**2 * (steps[:, 2:4] ** 2).sum(1)).sum())


def flicker(frames: np.ndarray, identity: world.Identity) -> float:
    """The second difference in time of what differs from the redrawn character, inside its outline."""
    video = frames.astype(np.float32) / 255
    every = range(1, len(frames))
    pose = np.concatenate([np.zeros((1, len(world.POSE))), world.track(video, identity, frames=every)])
    drawn, alpha = world.draw_character(identity, pose)
    apart, inside = video - drawn, alpha > 0.99
    second = apart[:-2] - 2 * apart[1:-1] + apart[2:]
    return float(255 * np.sqrt(np.mean(second[inside[:-2] & inside[1:-1] & inside[2:]] ** 2)))


# --- the clips ----------------------------------------------------------------------------------------------


def make_clips(identities: int, folder: Path) -> Iterator[Row]:
    """What is measured and what is true of every clip."""
    rng, model = np.random.default_rng(SEED), load("tiny", device="cpu")
    motions, scales = itertools.cycle(MOTIONS), itertools.cycle(GUIDANCE)
    for number in range(identities):
        identity = world.sample_identity(rng)
        image = Image.fromarray(world.first_frame(identity))
        own = {"seed": number, "run_id": f"{number}", "output_dir": folder, "progress": False}
        prior = generate_prior(model, image, prompt="she stays still", **own)
        for motion, cfg_scale in itertools.islice(zip(motions, scales, strict=False), 2):
            case = {"identity_number": number, "motion": motion, "cfg_scale": cfg_scale}
            for row in make_ladder(model, prior, identity, motion, cfg_scale):
                yield case | row


def make_ladder(
    model: Model, prior: Prior, identity: world.Identity, motion: str, cfg_scale: float
) -> list[Row]:
    """One motion in more and more steps, and resumed late."""
    rows, clips = [], []
    for choice in (*({"num_steps": number} for number in NUM_STEPS), {"start_step": 6}):
        prompt = f"she {world.WORDINGS[motion][0][0]}"
        clip = infer_from_prior(model, prior, prompt, cfg_scale=cfg_scale, progress=False, **choice)
        clips.append(np.stack([np.asarray(frame) for frame in clip.frames]))
        predicted = {"predicted_closeness": clip.report.get("predicted_closeness")}
        rows.append(choice | measure_frames(clip.frames) | predicted | measure_truth(clips[-1], identity))
        print(rows[-1], file=sys.stderr, flush=True)
    goal = clips[len(NUM_STEPS) - 1]
    for row, frames in zip(rows, clips, strict=True):
        row["closeness"] = None if frames is goal else psnr(frames, goal)
    return rows


# --- what follows -------------------------------------------------------------------------------------------


def correlations(rows: Sequence[Row], one: str, other: str) -> dict[str, float]:
    """Spearman's, over all clips that have both, and of the ranks less each motion's mean rank."""
    known = [row for row in rows if row.get(one) is not None and row.get(other) is not None]
    values = [np.array([row[name] for row in known]) for name in (one, other)]
    motions = np.array([row["motion"] for row in known])
    ranks = [rankdata(each) for each in values]
    for motion, each in itertools.product(set(motions), ranks):
        each[motions == motion] -= each[motions == motion].mean()
    return {
        "clips": len(known),
        "spearman": float(spearmanr(*values).statistic),
        "within_motions": float(np.corrcoef(*ranks)[0, 1]),
    }


def redone(rows: Sequence[Row]) -> dict[str, Row]:
    """What the next number of steps gives to all clips, and to the quarter that a measure calls the worst."""
    ladders = [row for row in rows if "num_steps" in row]
    pairs = [(few, more) for few, more in itertools.pairwise(ladders) if few["num_steps"] < more["num_steps"]]
    for few, more in pairs:
        few["error_gain"] = few["identity_error"] - more["identity_error"]
        few["closeness_gain"] = (more["closeness"] or np.nan) - few["closeness"]
    few = [pair[0] for pair in pairs]
    names = {"all": 0, "identity": 1, "predicted_closeness": 1, "flicker": -1}
    found = {}
    for name, sign in names.items():
        worst = few if name == "all" else sorted(few, key=lambda row: sign * row[name])[: len(few) // 4]
        found[name] = {
            "clips": len(worst),
            **{
                key: float(np.nanmean([row[key] for row in worst]))
                for key in ("identity_error", "error_gain", "closeness", "closeness_gain")
            },
        }
    return found


def cost() -> Row:
    """CPU seconds of a real clip's size."""
    rng = np.random.default_rng(0)
    wide = Image.fromarray(rng.integers(0, 255, (60, 125, 3), dtype=np.uint8)).resize((1000, 480))
    frames = [wide.crop((2 * number, 0, 832 + 2 * number, 480)) for number in range(81)]
    measure_frames(frames[:3])  # imports
    begin = time.process_time()
    measure_frames(frames)
    return {"frames": 81, "size": [832, 480], "cpu_seconds": time.process_time() - begin}


def main() -> None:
    """Make the clips and compare, or measure what that costs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--identities", type=int, default=12)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if args.cost:
        result = cost()
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows = list(make_clips(args.identities, Path(folder)))
        result = {
            "agreement": {f"{one}, {other}": correlations(rows, one, other) for one, other, _ in PAIRS},
            "redone": redone(rows),
        }
        print(json.dumps(result, indent=1))
        result["clips"] = rows
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
