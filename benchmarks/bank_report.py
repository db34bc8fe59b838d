"""From the clips.csv of bank.py to tables: what several priors are worth, and predicted against measured."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1]),
    str(Path(__file__).resolve().parents[1] / "data" / "tiny_wan_i2v"),
]

from promise_report import Row, guidances, guided_by, mean_of, table

from step_skip.method.closeness import CLOSENESS, FIT, MOST_CLOSENESS, fewest_steps, predicted_closeness

NEAR = 2.0  # dB


def paths_of(rows: Iterable[Row]) -> list[str]:
    """What was followed, in the order it was run."""
    return list(dict.fromkeys(row["path"] for row in rows))


def bank_table(rows: list[Row]) -> str:
    """PSNR to the full run by path and steps."""
    lines = []
    for path in paths_of(rows):
        some = [row for row in rows if row["path"] == path]
        has_it = np.mean([row["motion_of_path"] == row["new_motion"] for row in some])
        by_steps = ([row for row in some if int(row["steps"]) == steps] for steps in FIT)
        cells = [mean_of(each, "psnr", 1, interval=True) for each in by_steps]
        lines.append([path, f"{has_it:.2f}", mean_of(by_one(some), "as_it_is", 1, interval=True), *cells])
    head = [f"{n} steps, {2 * n - 1} forwards" if n > 1 else "1 step, 1 forward" for n in FIT]
    return table(("followed", "same motion", "its own clip as it is", *head), lines)


def by_one(rows: Iterable[Row]) -> list[Row]:
    """The rows of one number of steps: what holds for all of them, once."""
    return [row for row in rows if int(row["steps"]) == 1]


def once_each(rows: Iterable[Row]) -> list[Row]:
    """Every clip once, though it may stand for several banks; without a prior's own motion in its words."""
    clips = {(row["index"], row["cfg_scale"], row["apart"], row["steps"]): row for row in rows}
    return [row for row in clips.values() if float(row["apart"]) > 0]


def fitted(rows: list[Row]) -> str:
    """closeness.FIT as these clips give it: least squares for each number of steps."""
    lines = []
    for steps in FIT:
        some = [row for row in rows if int(row["steps"]) == steps]
        logarithms = -np.log10([[float(row["apart"]), float(row["cfg_scale"])] for row in some])
        columns = np.column_stack([np.ones(len(some)), logarithms])
        factors, *_ = np.linalg.lstsq(columns, [float(row["psnr"]) for row in some])
        lines.append(f"    {steps}: ({', '.join(f'{factor:.1f}' for factor in factors)}),")
    return "\n".join(lines) + "\n"


def prediction_table(rows: list[Row]) -> str:
    """How far off the prediction from the first evaluation is, by the number of steps."""
    from scipy.stats import spearmanr

    lines = []
    for steps in FIT:
        some = [row for row in rows if int(row["steps"]) == steps]
        measured = np.array([min(float(row["psnr"]), MOST_CLOSENESS) for row in some])
        predicted = np.array(
            [
                predicted_closeness(float(row["apart"]), steps, cfg_scale=float(row["cfg_scale"]))
                for row in some
            ]
        )
        off = measured - predicted
        cells = (off.mean(), np.sqrt((off**2).mean()), np.mean(abs(off) < NEAR))
        order = spearmanr([float(row["apart"]) for row in some], measured).statistic
        lines.append(
            [str(steps), str(len(some)), f"{cells[0]:+.1f}", *(f"{x:.2f}" for x in (*cells[1:], order))]
        )
    head = ("steps", "clips", "measured less predicted, dB", "root mean square, dB", f"within {NEAR:g} dB")
    return table((*head, "Spearman of distance and PSNR"), lines)


def auto_table(rows: list[Row]) -> str:
    """What --num_steps auto would have run for each closeness, and what came out."""
    clips: dict[tuple[str, ...], dict[int, Row]] = {}
    for row in rows:
        clips.setdefault((row["index"], row["cfg_scale"], row["apart"]), {})[int(row["steps"])] = row
    lines = []
    for name, closeness in CLOSENESS.items():
        taken = []
        for by_steps in clips.values():
            apart, cfg_scale = (float(by_steps[1][name]) for name in ("apart", "cfg_scale"))
            taken.append(by_steps[fewest_steps(apart, FIT, closeness, cfg_scale=cfg_scale)])
        measured = np.array([float(row["psnr"]) for row in taken])
        forwards = np.array([int(row["forwards"]) for row in taken])
        fixed = {n: np.mean([float(each[n]["psnr"]) >= closeness for each in clips.values()]) for n in FIT}
        reached = np.mean(measured >= closeness)
        same = next((n for n in FIT if fixed[n] >= reached), max(FIT))
        lines.append(
            [
                f"{name}, {closeness:g} dB",
                f"{forwards.mean():.1f}",
                f"{reached:.2f}",
                f"{np.mean(measured >= closeness - NEAR):.2f}",
                f"{measured.mean():.1f}",
                f"{same} steps, {2 * same - 1 if same > 1 else 1} forwards: {fixed[same]:.2f}",
            ]
        )
    head = ("closeness", "forwards", "reached", f"reached but for {NEAR:g} dB", "PSNR")
    return table((*head, "fixed number of steps that reaches it as often"), lines)


def write(clips: Path, output: Path) -> Path:
    """Write summary.md; returns it."""
    with clips.open(newline="") as file:
        rows = list(csv.DictReader(file))
    parts = []
    for cfg_scale in guidances(rows):
        some = guided_by(rows, cfg_scale)
        cases = len({row["index"] for row in some})
        parts.append(f"## Guidance {cfg_scale:g} ({cases} identities)\n\n{bank_table(some)}")
    for name, keep in (("50 steps", False), ("10 steps", True)):
        some = once_each(row for row in rows if ("10 steps" in row["path"]) == keep)
        parts.append(f"## closeness.FIT from these, priors of {name}\n\n{fitted(some)}")
        parts.append(f"## Predicted by the first evaluation, priors of {name}\n\n{prediction_table(some)}")
        parts.append(f"## --num_steps auto, priors of {name}\n\n{auto_table(some)}")
    summary = output / "summary.md"
    summary.write_text("\n".join(parts))
    return summary
