"""From promise.py's clips.csv to tables and a plot: quality over cost, and what beats what, pair by pair."""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data" / "tiny_wan_i2v"))

from figures import bootstrap

NUMBERS = (
    "obeyed",
    "old_kept",
    "identity_error",
    "sharpness",
    "bloom_error",
    "decided",
    "psnr",
    "ssim",
    "shared_with_full",
    "denoise_seconds",
)
SMALL = ("speak", "sleep")  # motions that leave the head and the body in their place
CLASSES = {"all": lambda motion: True, "small motion": lambda motion: motion in SMALL}
CLASSES |= {"whole body": lambda motion: motion not in (*SMALL, "still")}
Row = dict[str, str]
Key = tuple[str, str]  # method, prior

OURS = "differential, {} steps"
RIVALS = (  # what somebody would do instead, at 3, 4 and 6 steps
    ("DPM++ 2M, {} steps", "still"),
    ("DPM++ 2M, {} steps on our sigmas", "still"),
    ("UniPC, {} steps", "still"),
    ("UniPC, {} steps on our sigmas", "still"),
)
FULL = ("Euler, 10 steps", "none")
HEADLINE = (  # the readme's rows
    ("10 steps from noise, Euler", *FULL),
    ("**differential, 6 steps**", OURS.format(6), "still"),
    ("6 steps from noise, DPM++ 2M on our sigmas", RIVALS[1][0].format(6), "still"),
    ("**differential, 4 steps**", OURS.format(4), "still"),
    ("the same, prior of another motion", OURS.format(4), "motion"),
    ("the same, prior of 10 steps that holds still", OURS.format(4), "still 10"),
    ("4 steps from noise, DPM++ 2M on our sigmas", RIVALS[1][0].format(4), "still"),
    ("4 steps from noise, DPM++ 2M", RIVALS[0][0].format(4), "still"),
    ("**differential, 3 steps**", OURS.format(3), "still"),
    ("the original recipe: resume after 6 of 10", "the original recipe: resume after 6 of 10", "motion 10"),
    ("**differential, 2 steps**", OURS.format(2), "still"),
    ("**differential, 1 step**", OURS.format(1), "still"),
)
LINES = {  # of the plot: name with a {} for the number of steps, prior, colour
    "differential, prior that holds still": (OURS, "still", "#117a65"),
    "differential, prior of another motion": (OURS, "motion", "#e67e22"),
    "DPM++ 2M on our sigmas": (RIVALS[1][0], "still", "#2471a3"),
    "DPM++ 2M": (RIVALS[0][0], "still", "#85c1e9"),
    "UniPC": (RIVALS[2][0], "still", "#8e44ad"),
    "Euler, DiffSynth's own": ("Euler, {} steps", "none", "#7f8c8d"),
}


def group(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """Lines by method and prior, in the order they were made."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["prior"]), []).append(row)
    return groups


def guidances(rows: Iterable[Row]) -> list[float]:
    """The cfg_scales that were run."""
    return sorted({float(row["cfg_scale"]) for row in rows})


def guided_by(rows: Iterable[Row], cfg_scale: float) -> list[Row]:
    """The lines of one cfg_scale."""
    return [row for row in rows if float(row["cfg_scale"]) == cfg_scale]


def moving(rows: Iterable[Row], kind: str) -> list[Row]:
    """The lines whose new motion is of one of CLASSES."""
    return [row for row in rows if CLASSES[kind](row["new_motion"])]


def mean_of(rows: Iterable[Row], name: str, digits: int, *, interval: bool = False) -> str:
    """A number as a table shows it, with the half-width of its 95% interval over identities if asked for."""
    mean, low, high = bootstrap(by_identity(rows, name).values())
    return f"{mean:.{digits}f}" + (f" ± {(high - low) / 2:.{digits}f}" if interval else "")


def by_identity(rows: Iterable[Row], name: str) -> dict[str, float]:
    """The mean of a number over each identity's seeds: clips of one identity don't count as independent."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["index"], []).append(float(row[name]))
    return {index: sum(each) / len(each) for index, each in values.items()}


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A markdown table."""
    head = list(head)
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def summary_table(rows: list[Row]) -> str:
    """Every method at one guidance, dearest first."""
    head = ("how the new prompt's clip is made", "prior", "forwards", "seconds, median", "obeyed")
    head += ("old motion", "identity error", "sharpness", "decided", "SSIM")
    head += tuple(f"PSNR, {kind}" for kind in CLASSES)
    lines = []
    for (method, prior), members in group(rows).items():
        forwards = int(members[0]["forwards"])
        # a machine may stand still, which makes a mean worthless
        seconds = statistics.median(float(row["denoise_seconds"]) for row in members)
        cells = [method, prior, str(forwards), f"{seconds:.2f}"]
        cells += [mean_of(members, name, 2) for name in ("obeyed", "old_kept")]
        cells += [mean_of(members, "identity_error", 1)]
        cells += [mean_of(members, name, 2) for name in ("sharpness", "decided")]
        cells += [mean_of(members, "ssim", 3)]
        for kind in CLASSES:
            some = moving(members, kind)
            is_reference = all(float(row["psnr"]) == 99 for row in some)
            cells.append("" if is_reference else mean_of(some, "psnr", 1, interval=True))
        lines.append((forwards, cells))
    return table(head, [cells for _, cells in sorted(lines, key=lambda line: -line[0])])


def headline_table(rows: list[Row]) -> str:
    """The readme's table: what a user chooses between, both guidances side by side."""
    scales = guidances(rows)
    head = ["how the new prompt's clip is made", "forwards", "obeyed"]
    head += [f"guidance {scale:g}: {kind}" for scale in scales for kind in CLASSES]
    lines = []
    for label, *key in HEADLINE:
        some = [row for row in rows if [row["method"], row["prior"]] == key]
        cells = [label, some[0]["forwards"], mean_of(some, "obeyed", 2)]
        for scale in scales:
            cells += [mean_of(moving(guided_by(some, scale), kind), "psnr", 1) for kind in CLASSES]
        lines.append(cells)
    return table(head, lines)


def difference(rows: list[Row], first: Key, second: Key, name: str) -> str:
    """Mean difference over the identities that both have, with its interval; empty where there are none."""
    groups = group(rows)
    ours, theirs = (by_identity(groups.get(key, []), name) for key in (first, second))
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return ""
    mean, low, high = bootstrap(ours[index] - theirs[index] for index in shared)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def paired_table(rows: list[Row]) -> str:
    """PSNR of ours less that of what somebody would do instead, case by case, in every motion class."""
    known = group(rows).keys()
    pairs = []
    for prior in ("still", "motion"):
        for steps in (3, 4, 6):
            ours = (OURS.format(steps), prior)
            rivals = [(name.format(steps), kind) for name, kind in RIVALS]
            pairs += [(ours, rival) for rival in (*rivals, FULL) if ours in known and rival in known]
    pairs += [((OURS.format(2), "still"), FULL)]
    variants = [key for key in known if key[0].startswith(f"{OURS.format(4)}, ")]
    pairs += [((OURS.format(4), "still"), variant) for variant in variants]
    pairs += [((OURS.format(steps), "still"), (OURS.format(steps), "still 10")) for steps in (3, 4)]
    lines = [
        [
            ", ".join(first),
            ", ".join(second),
            *(difference(moving(rows, kind), first, second, "psnr") for kind in CLASSES),
        ]
        for first, second in pairs
    ]
    return table(("difference of", "to", *CLASSES), lines)


def plot(rows: list[Row], path: Path) -> None:
    """PSNR to the 50-step run over forwards: a panel for each guidance and class of motion."""
    import matplotlib.pyplot as plt

    scales = guidances(rows)
    figure, axes = plt.subplots(
        len(scales),
        len(CLASSES),
        figsize=(12, 4 * len(scales)),
        sharex=True,
        layout="constrained",
        squeeze=False,
    )
    for line, cfg_scale in zip(axes, scales, strict=True):
        for axis, kind in zip(line, CLASSES, strict=True):
            groups = group(moving(guided_by(rows, cfg_scale), kind))
            for label, (name, prior, colour) in LINES.items():
                found = [groups[key] for n in (1, 2, 3, 4, 6) if (key := (name.format(n), prior)) in groups]
                values = [bootstrap(by_identity(members, "psnr").values()) for members in found]
                x = [int(members[0]["forwards"]) for members in found]
                error = [[m - low for m, low, _ in values], [high - m for m, _, high in values]]
                style = {"fmt": "o-", "ms": 4, "lw": 1.2, "elinewidth": 0.7, "color": colour, "label": label}
                axis.errorbar(x, [mean for mean, *_ in values], error, **style)
            full = bootstrap(by_identity(groups.get(FULL, []), "psnr").values())[0]
            axis.axhline(full, color="grey", ls=":", label="10 steps, 20 forwards")
            axis.set_title(f"guidance {cfg_scale:g}, {kind}", fontsize=10)
            axis.grid(alpha=0.25)
    for axis in axes[-1]:
        axis.set_xlabel("forwards (network evaluations)")
        axis.set_xticks((1, 3, 5, 7, 8, 11))
    for line in axes:
        line[0].set_ylabel("PSNR to the 50-step run (dB)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(clips: Path, output: Path) -> Path:
    """Write summary.md, paired.md, headline.md and quality.png; returns the first."""
    with clips.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name, make in (("summary.md", summary_table), ("paired.md", paired_table)):
        parts = []
        for cfg_scale in guidances(rows):
            some = guided_by(rows, cfg_scale)
            identities, seeds = (len({row[name] for row in some}) for name in ("index", "seed"))
            each = seeds // identities
            about = f"{identities} identities" + (f", {each} seeds each" if each > 1 else "")
            parts.append(f"## Guidance {cfg_scale:g} ({about})\n\n{make(some)}")
        (output / name).write_text("\n".join(parts))
    (output / "headline.md").write_text(headline_table(rows))
    plot(rows, output / "quality.png")
    return output / "summary.md"
