"""From promise.py's clips.csv to a summary, a table and two plots."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
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
TABLE = ("obeyed", "old_kept", "identity_error", "sharpness", "decided", "psnr", "shared_with_prior")
Row = dict[str, str]


def group(rows: list[Row]) -> dict[tuple[str, str, str, str], list[Row]]:
    """Lines by method, prior, steps run and forwards, in the order they were made."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["prior"], row["steps"], row["forwards"]), []).append(row)
    return groups


def summarise(rows: list[Row]) -> list[dict]:
    """One line for every method at every cost: mean, low and high of every number."""
    lines = []
    for (method, prior, steps, forwards), members in group(rows).items():
        line = {
            "method": method,
            "prior": prior,
            "steps": steps,
            "forwards": int(forwards),
            "clips": len(members),
        }
        for name in NUMBERS:
            values = bootstrap(float(row[name]) for row in members)
            line |= {
                f"{name}{end}": round(v, 4) for end, v in zip(("", "_low", "_high"), values, strict=True)
            }
        lines.append(line)
    return lines


def as_markdown(summary: list[dict]) -> str:
    """The table: sorted by cost, mean with the half-width of its interval."""
    head = ("method", "prior", "steps run", "forwards", *(name.replace("_", " ") for name in TABLE))
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for line in sorted(summary, key=lambda line: -line["forwards"]):
        cells = [line["method"], line["prior"], line["steps"], str(line["forwards"])]
        for name in TABLE:
            half = (line[f"{name}_high"] - line[f"{name}_low"]) / 2
            cells.append(
                f"{line[name]:.2f} ± {half:.2f}" if line[name] < 10 else f"{line[name]:.1f} ± {half:.1f}"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


HEADLINE = (
    ("full run, 10 steps", "full run", "none", "0 1 2 3 4 5 6 7 8 9"),
    ("the original recipe: prior of another motion, resumed after 6", "resume", "motion", "7 8 9"),
    ("the same with the old prompt as the negative one", "resume, old prompt as negative", "motion", "7 8 9"),
    ("neutral prior, resumed after 6", "resume", "empty", "7 8 9"),
    ("prior that stays still, resumed after 6", "resume", "still", "7 8 9"),
    ("4 steps from noise", "fewer steps", "none", "0 1 2 3"),
    ("4 steps from noise on sigmas 0, 4, 7, 9 of the 10", "fewer steps, chosen sigmas", "none", "0 4 7 9"),
    ("**differential 0 4 7 9, prior that stays still**", "differential", "still", "0 4 7 9"),
    ("3 steps from noise", "fewer steps", "none", "0 1 2"),
    ("3 steps from noise on sigmas 0, 5, 8 of the 10", "fewer steps, chosen sigmas", "none", "0 5 8"),
    ("video to video, strength 0.9, 3 steps", "video to video 0.9", "motion", "0 1 2"),
    ("FlowEdit, 2 steps", "FlowEdit", "motion", "0 6"),
    ("**differential 0 5 8, prior that stays still**", "differential", "still", "0 5 8"),
    ("differential 0 5 8, neutral prior", "differential", "empty", "0 5 8"),
    ("differential 0 5 8, prior of another motion", "differential", "motion", "0 5 8"),
    ("2 steps from noise", "fewer steps", "none", "0 1"),
    ("2 steps from noise on sigmas 0, 7 of the 10", "fewer steps, chosen sigmas", "none", "0 7"),
    ("**differential 1 7, prior that stays still**", "differential", "still", "1 7"),
    ("differential 1 7, prior of another motion", "differential", "motion", "1 7"),
    ("1 step from noise", "fewer steps", "none", "0"),
    ("differential 1, prior that stays still", "differential", "still", "1"),
)


def headline(summary: list[dict]) -> str:
    """The README's table: the rows a user chooses between."""
    names = ("obeyed", "old_kept", "identity_error", "sharpness", "decided", "psnr")
    head = ("how the new prompt's clip is made", "forwards", "seconds", "obeyed", "old motion")
    head += ("identity error", "sharpness", "details decided", "PSNR to full run")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    found = {(line["method"], line["prior"], line["steps"]): line for line in summary}
    for label, *key in HEADLINE:
        if (line := found.get(tuple(key))) is None:
            continue
        cells = [
            f"{line[name]:.2f}" if name not in ("identity_error", "psnr") else f"{line[name]:.1f}"
            for name in names
        ]
        cells[-1] = "" if line["psnr"] == 99 else cells[-1]
        cost = f"{line['forwards']} | {line['denoise_seconds']:.2f}"
        lines.append(f"| {label} | {cost} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


FULL = ("full run", "none", "0 1 2 3 4 5 6 7 8 9")
ON_SIGMAS, WHOLE_BEND = "fewer steps, chosen sigmas", "differential, whole bend"
CLAIMS = (  # difference of the first to the second, pair by pair
    (("differential", "still", "0 4 7 9"), FULL),
    (("differential", "still", "0 4 7 9"), (ON_SIGMAS, "none", "0 4 7 9")),
    (("differential", "still", "0 4 7 9"), ("differential", "still", "0 3 6 8")),
    (("differential", "still", "0 5 8"), FULL),
    (("differential", "still", "0 5 8"), ("fewer steps", "none", "0 1 2")),
    (("differential", "still", "0 5 8"), (ON_SIGMAS, "none", "0 5 8")),
    (("differential", "still", "0 5 8"), ("differential", "still", "0 6 9")),
    (("differential", "still", "0 5 8"), ("differential, steps by its bends", "still", "3 steps")),
    (("differential", "still", "0 5 8"), ("differential", "motion", "0 5 8")),
    (("differential", "motion", "0 5 8"), FULL),
    (("differential", "motion", "0 5 8"), (ON_SIGMAS, "none", "0 5 8")),
    (("differential", "empty", "0 5 8"), (ON_SIGMAS, "none", "0 5 8")),
    (("differential", "still", "0 5 8"), (WHOLE_BEND, "still", "0 5 8")),
    (("differential", "motion", "0 5 8"), (WHOLE_BEND, "motion", "0 5 8")),
    (("differential", "empty", "0 5 8"), (WHOLE_BEND, "empty", "0 5 8")),
    ((WHOLE_BEND, "empty", "0 5 8"), ("differential, second order", "empty", "0 5 8")),
    (("differential", "still", "1 7"), FULL),
    (("differential", "still", "1 7"), (ON_SIGMAS, "none", "0 7")),
    (("differential", "still", "1 7"), ("differential", "still", "2 7")),
    (("differential", "still", "1"), FULL),
    (("differential", "still", "1"), ("differential", "still", "0")),
)


def paired(rows: list[Row]) -> str:
    """What beats what: mean differences over the same cases with their intervals."""
    cases: dict[tuple, dict[tuple, Row]] = {}
    for row in rows:
        members = cases.setdefault((row["method"], row["prior"], row["steps"]), {})
        members[row["index"], row["seed"]] = row
    names = ("obeyed", "identity_error", "sharpness", "decided", "psnr")
    head = ("difference of", "to", *(name.replace("_", " ") for name in names))
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for first, second in CLAIMS:
        if first not in cases or second not in cases:
            continue
        shared = sorted(cases[first].keys() & cases[second].keys())
        cells = [", ".join(first), ", ".join(second)]
        for name in names:
            pairs = ((float(cases[first][key][name]), float(cases[second][key][name])) for key in shared)
            mean, low, high = bootstrap(a - b for a, b in pairs)
            cells.append(f"{mean:+.3f} ({low:+.3f} to {high:+.3f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


SMALL = ("speak", "sleep")  # motions that leave the head and the body in their place


def by_motion(rows: list[Row]) -> str:
    """How near to the full run the cheap ways come, for small motions, for large ones and for both."""
    head = ("how the new prompt's clip is made", "forwards", "new motion", "clips", "PSNR to full run")
    head += ("pattern error", "identity error")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for label, *key in HEADLINE:
        for name, kinds in {"small": (True,), "large": (False,), "either": (True, False)}.items():
            some = [
                row
                for row in rows
                if [row["method"], row["prior"], row["steps"]] == key
                and (row["new_motion"] in SMALL) in kinds
                and row["new_motion"] != "still"  # a prior that stays still would be the answer itself
            ]
            if not some or key == list(FULL):
                continue
            cells = [label, some[0]["forwards"], name, str(len(some))]
            for number in ("psnr", "bloom_error", "identity_error"):
                mean, low, high = bootstrap(float(row[number]) for row in some)
                digits = 2 if number == "bloom_error" else 1
                cells.append(f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot_start_step(summary: list[dict], path: Path) -> None:
    """What plain resume keeps and obeys over the start step, from a motion prior and from a neutral one."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), constrained_layout=True)
    for axis, name, label in zip(
        axes,
        ("obeyed", "old_kept", "identity_error"),
        ("new motion obeyed", "old motion kept", "identity error (8-bit levels)"),
        strict=True,
    ):
        for prior, colour in (("motion", "#c0392b"), ("empty", "#2471a3")):
            lines = [ln for ln in summary if ln["method"] == "resume" and ln["prior"] == prior]
            x = [int(ln["steps"].split()[0]) - 1 for ln in lines]
            axis.plot(x, [ln[name] for ln in lines], "o-", color=colour, label=f"{prior} prior")
            axis.fill_between(
                x,
                [ln[f"{name}_low"] for ln in lines],
                [ln[f"{name}_high"] for ln in lines],
                color=colour,
                alpha=0.2,
            )
        full = next(ln for ln in summary if ln["method"] == "full run")
        axis.axhline(full[name], color="grey", ls=":", label="full run")
        axis.set(xlabel="start step", title=label)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


FAMILIES: tuple[tuple[str, str, Callable[[dict], bool]], ...] = (
    ("fewer steps from noise", "#7f8c8d", lambda ln: ln["method"] in ("fewer steps", "full run")),
    ("fewer steps, chosen sigmas", "#bdc3c7", lambda ln: ln["method"] == "fewer steps, chosen sigmas"),
    ("resume, motion prior", "#c0392b", lambda ln: (ln["method"], ln["prior"]) == ("resume", "motion")),
    ("resume, neutral prior", "#2471a3", lambda ln: (ln["method"], ln["prior"]) == ("resume", "empty")),
    (
        "differential, prior that stays still",
        "#117a65",
        lambda ln: (ln["method"], ln["prior"]) == ("differential", "still"),
    ),
    (
        "differential, motion prior",
        "#e67e22",
        lambda ln: (ln["method"], ln["prior"]) == ("differential", "motion"),
    ),
    (
        "differential, neutral prior",
        "#82c99b",
        lambda ln: (ln["method"], ln["prior"]) == ("differential", "empty"),
    ),
    ("video to video", "#8e44ad", lambda ln: ln["method"].startswith("video to video")),
    ("FlowEdit", "#d4ac0d", lambda ln: ln["method"] == "FlowEdit"),
)


QUALITY = {
    "obeyed": "new motion obeyed",
    "decided": "details decided (share of tiles)",
    "psnr": "PSNR to the full run, same noise (dB)",
    "identity_error": "identity error (8-bit levels, less is better)",
}


def best_by_cost(lines: list[dict]) -> list[dict]:
    """At every cost the line that is nearest to the full run."""
    best: dict[int, dict] = {}
    for line in lines:
        if line["forwards"] not in best or line["psnr"] > best[line["forwards"]]["psnr"]:
            best[line["forwards"]] = line
    return [best[forwards] for forwards in sorted(best)]


def plot_quality(summary: list[dict], path: Path) -> None:
    """Every family's best at each cost: obedience, detail, distance to the full run, identity."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    for axis, (name, label) in zip(axes.flat, QUALITY.items(), strict=True):
        for place, (family, colour, belongs) in enumerate(FAMILIES):
            lines = best_by_cost([line for line in summary if belongs(line)])
            lines = [line for line in lines if not (name == "psnr" and line["psnr"] == 99)]
            low, high = ([abs(ln[f"{name}_{end}"] - ln[name]) for ln in lines] for end in ("low", "high"))
            x = [line["forwards"] * 1.012 ** (place - len(FAMILIES) / 2) for line in lines]
            style = {"marker": "o", "ms": 4, "lw": 1, "elinewidth": 0.7, "color": colour, "label": family}
            axis.errorbar(x, [line[name] for line in lines], [low, high], **style)
        axis.set(xscale="log", title=label)
        axis.set_xticks((2, 4, 6, 8, 12, 20), ("2", "4", "6", "8", "12", "20"))
        axis.minorticks_off()
    for axis in axes[1]:
        axis.set_xlabel("forwards (network evaluations)")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(clips: Path, output: Path) -> Path:
    """Write summary.csv, summary.md and the plots; returns the table's path."""
    rows = list(csv.DictReader(clips.open()))
    summary = summarise(rows)
    with (output / "summary.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, summary[0])
        writer.writeheader()
        writer.writerows(summary)
    (output / "summary.md").write_text(as_markdown(summary))
    (output / "headline.md").write_text(headline(summary))
    (output / "paired.md").write_text(paired(rows))
    (output / "by_motion.md").write_text(by_motion(rows))
    plot_start_step(summary, output / "start_step.png")
    plot_quality(summary, output / "quality.png")
    return output / "summary.md"
