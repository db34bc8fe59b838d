"""From evaluate.py's clips.csv to the figures of the readme: summary.json, summary.md and the plot."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import world

STEPS = (1, 2, 3, 4, 6, 8, 10, 20)
MEASURES = ("identity_error", "colour_error", "place_error", "sharpness", "bloom_error", "decided")
NUMBERS = ("obeyed", *MEASURES, "psnr", "agreement")
Row = dict[str, str]


def bootstrap(values: Iterable[float], *, draws: int = 2000) -> tuple[float, float, float]:
    """Mean and its 95% percentile interval over cases (Efron & Tibshirani 1993, ch. 13), seeded."""
    values = np.asarray([value for value in values if np.isfinite(value)], float)
    if not len(values):
        return (float("nan"),) * 3
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    return float(values.mean()), *map(float, np.percentile(values[picks].mean(1), (2.5, 97.5)))


def summarise(rows: list[Row]) -> dict:
    """Mean and interval of every number, by experiment and steps, and the gain of more steps."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        name = f"steps_{row['steps']}" if row["experiment"] == "steps" else row["experiment"]
        groups.setdefault(name, []).append(row)
    summary = {name: summarise_group(group) for name, group in groups.items()}
    return summary | {"ten_over_three": gain(rows, 10, 3), "twenty_over_ten": gain(rows, 20, 10)}


def summarise_group(group: list[Row]) -> dict:
    """Mean and interval of every number that was measured, and the share that obeyed by motion."""
    table: dict = {"clips": len(group)}
    for number in NUMBERS:
        if values := [float(row[number]) for row in group if row[number]]:
            table[number] = bootstrap(values)
    by_motion = {m: [int(row["obeyed"]) for row in group if row["motion"] == m] for m in world.MOTIONS}
    table["obeyed_by_motion"] = {m: float(np.mean(values)) for m, values in by_motion.items() if values}
    return table


def gain(rows: list[Row], more: int, fewer: int) -> dict:
    """Mean difference and interval of every measure between two numbers of steps from the same noise."""
    curve = {(row["steps"], row["index"]): row for row in rows if row["experiment"] == "steps"}
    pairs = [(row, curve[str(fewer), index]) for (steps, index), row in curve.items() if steps == str(more)]
    return {
        number: bootstrap(float(after[number]) - float(before[number]) for after, before in pairs)
        for number in MEASURES
    }


# --- tables -------------------------------------------------------------------------------------------------

HEAD = "| {} | n | motion shown, % | identity error | sharpness | pattern error | decided |{}"
GROUPS = {
    "true": "true clips",
    "vae": "... through the VAE",
    "default": "10 steps, trained wordings",
    "held_out": "10 steps, held-out wordings",
}


def interval(value: tuple[float, float, float], digits: int = 2, scale: float = 1) -> str:
    """Mean (low to high)."""
    mean, low, high = (f"{scale * v:.{digits}f}" for v in value)
    return f"{mean} ({low} to {high})"


def cells(name: str, table: dict) -> list[str]:
    """One line of either table."""
    return [
        name,
        str(table["clips"]),
        interval(table["obeyed"], 1, 100),
        interval(table["identity_error"], 1),
        *(interval(table[number]) for number in ("sharpness", "bloom_error", "decided")),
    ]


def as_markdown(summary: dict) -> str:
    """Every figure of the readme."""
    lines = [HEAD.format("clips", ""), "|" + "---|" * 7]
    lines += ["| " + " | ".join(cells(label, summary[name])) + " |" for name, label in GROUPS.items()]
    shown = ", ".join(f"{m} {100 * v:.0f}%" for m, v in summary["default"]["obeyed_by_motion"].items())
    lines += ["", f"By motion (10 steps, trained wordings): {shown}.", ""]
    lines += [HEAD.format("steps", f" PSNR to {STEPS[-1]} steps |"), "|" + "---|" * 8]
    for steps in STEPS:
        table = summary[f"steps_{steps}"]
        near = "" if steps == STEPS[-1] else f"{table['psnr'][0]:.1f}"
        lines.append("| " + " | ".join([*cells(str(steps), table), near]) + " |")
    for name, label in (("ten_over_three", "10 steps over 3"), ("twenty_over_ten", "20 steps over 10")):
        decided, error = (interval(summary[name][number]) for number in ("decided", "bloom_error"))
        lines += ["", f"{label}, same noise: decided {decided}, pattern error {error}."]
    other, same, seconds = summary["other_seed"], summary["same_seed"], summary["seconds"]
    lines += [
        "",
        f"Another seed, same prompt and identity: PSNR {other['psnr'][0]:.1f} dB to the first, "
        f"{100 * other['agreement'][0]:.0f}% of the tiles alike (chance: 17%). The same seed: "
        f"PSNR {same['psnr'][0]:.0f} (99: identical), {100 * same['agreement'][0]:.0f}% alike.",
        "",
        f"Seconds: {seconds['load']} to load, {seconds['full_run']} for a clip at 10 steps, "
        f"{seconds['resumed_run']} for one resumed after step 6.",
    ]
    return "\n".join(lines) + "\n"


def plot_steps(summary: dict, path: Path) -> None:
    """Quality over steps, the VAE's reconstruction of true clips as the ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {
        "bloom_error": "error of the wall's pattern (lower is better)",
        "decided": "share of tiles decided",
        "identity_error": "identity error, 8-bit levels (lower is better)",
        "psnr": f"PSNR to {STEPS[-1]} steps, dB",
    }
    figure, axes = pyplot.subplots(1, len(labels), figsize=(4 * len(labels), 3.2), layout="constrained")
    for axis, (number, label) in zip(axes, labels.items(), strict=True):
        shown = [steps for steps in STEPS if not (number == "psnr" and steps == STEPS[-1])]
        mean, low, high = np.array([summary[f"steps_{steps}"][number] for steps in shown]).T
        axis.fill_between(shown, low, high, alpha=0.25, linewidth=0)
        axis.plot(shown, mean, "o-")
        if number != "psnr":
            axis.axhline(summary["vae"][number][0], color="grey", linestyle="--", label="VAE of true clips")
            axis.legend(frameon=False)
        axis.set(xscale="log", xlabel="steps from noise", title=label)
        axis.set_xticks(shown, [str(steps) for steps in shown])
        axis.minorticks_off()
    figure.savefig(path, dpi=110)


def write(rows: list[Row], seconds: dict, results: Path) -> Path:
    """Write summary.json, summary.md and steps.png; returns the table's path."""
    summary = summarise(rows) | {"seconds": seconds}
    (results / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (results / "summary.md").write_text(as_markdown(summary))
    plot_steps(summary, results / "steps.png")
    return results / "summary.md"
