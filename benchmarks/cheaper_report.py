"""The table and the chart of promise.py --methods cheaper: quality over blocks and over seconds."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import promise_report
from promise_report import Row

COSTS = {
    "forwards": "network evaluations",
    "block_evaluations": "block evaluations",
    "denoise_seconds": "seconds in the network",
}
QUALITY = ("obeyed", "identity_error", "decided", "psnr")
FAMILIES: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    ("fewer steps", "#7f8c8d", lambda name: name == "full run" or name.startswith("fewer steps")),
    (
        "skip-cache",
        "#2471a3",
        lambda name: "skip-cache" in name and "guided" not in name and name[-1].isdigit(),
    ),
    ("skip-cache with the branch", "#1abc9c", lambda name: name.endswith("branch")),
    ("whole residual", "#c0392b", lambda name: "whole residual" in name),
    ("guided on the first steps", "#8e44ad", lambda name: "guided" in name and "skip" not in name),
    ("differential", "#1e8449", lambda name: name == "differential"),
    ("distilled LoRA alone", "#d4ac0d", lambda name: name == "distilled LoRA"),
    ("... after the base model", "#e67e22", lambda name: name.startswith("distilled LoRA after")),
    ("... from a base prior", "#a04000", lambda name: name == "distilled LoRA from a base prior"),
    ("... differential, its own prior", "#ec7063", lambda name: name == "differential with the LoRA"),
)


def marker(method: str) -> str:
    """A square for what resumes from latents, a triangle for a differential resume, else a circle."""
    if method.startswith("differential"):
        return "^"
    return "s" if method.startswith("resume") or method.endswith("from a base prior") else "o"


def summarise(rows: list[Row]) -> list[dict]:
    """One line for every method: means, and the half-widths of their intervals as <name>_half."""
    lines = []
    for (method, prior, steps, forwards), members in promise_report.group(rows).items():
        line = {"method": method, "prior": prior, "steps": steps, "forwards": int(forwards)}
        for name in (*COSTS, *QUALITY):
            mean, low, high = promise_report.bootstrap(float(row[name]) for row in members)
            line |= {name: mean, f"{name}_half": (high - low) / 2}
        lines.append(line)
    return lines


def as_markdown(lines: list[dict]) -> str:
    """The table, dearest first."""
    head = ("method", "prior", "steps run", "forwards", "blocks", "seconds", "obeyed", "identity error")
    table = ["| " + " | ".join((*head, "decided", "PSNR to full run")) + " |", "|" + " --- |" * 10]
    for line in sorted(lines, key=lambda line: -line["block_evaluations"]):
        cost = f"{line['forwards']:.0f} | {line['block_evaluations']:.0f} | {line['denoise_seconds']:.2f}"
        cells = [f"{line[name]:.2f} ± {line[f'{name}_half']:.2f}" for name in QUALITY]
        cells[-1] = cells[-1] if shows(line, "psnr") else ""
        names = " | ".join((line["method"], line["prior"], line["steps"]))
        table.append(f"| {names} | {cost} | " + " | ".join(cells) + " |")
    return "\n".join(table) + "\n"


def shows(line: dict, quality: str) -> bool:
    """Whether a line belongs into a chart: the full run is infinitely near to itself."""
    return not (quality == "psnr" and line["psnr"] == 99)


def plot(lines: list[dict], path: Path) -> None:
    """Nearness to the full run and details decided, over blocks and over seconds."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    labels = {"psnr": "PSNR to the full run (dB)", "decided": "details decided (share of tiles)"}
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.5), constrained_layout=True)
    for row, (quality, label) in zip(axes, labels.items(), strict=True):
        for axis, cost in zip(row, ("block_evaluations", "denoise_seconds"), strict=True):
            for family, colour, belongs in FAMILIES:
                found = [line for line in lines if belongs(line["method"]) and shows(line, quality)]
                axis.plot([], [], "o", color=colour, label=family)
                for line in found:
                    style = {"fmt": marker(line["method"]), "ms": 5, "elinewidth": 0.7, "color": colour}
                    axis.errorbar(line[cost], line[quality], line[f"{quality}_half"], **style)
            axis.set(xscale="log", xlabel=COSTS[cost], ylabel=label)
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
    for name, shape in {"full": "o", "differential": "^", "resumed": "s"}.items():
        axes[0, 0].plot([], [], shape, color="black", label=f"({name})")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(clips: Path, output: Path) -> Path:
    """Write cheaper.md and cheaper.png; returns the table's path."""
    with clips.open(newline="") as file:
        lines = summarise(list(csv.DictReader(file)))
    (output / "cheaper.md").write_text(as_markdown(lines))
    plot(lines, output / "cheaper.png")
    return output / "cheaper.md"
