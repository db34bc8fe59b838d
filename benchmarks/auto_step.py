"""Which of a prior's own numbers says up to which step a new motion is obeyed, and what `auto` makes of it.

    python benchmarks/auto_step.py --identities 24
    python benchmarks/auto_step.py --report_only --text_share 0.6

For every unseen identity (promise.py's) a prior made with another motion and a neutral one are resumed after
each step with a new motion. Writes clips.csv (one line a clip), summary.md and obeyed.png to --output; what
clips.csv holds is not made again. Only identities whose full run obeys are judged: what the model can't do
says nothing about the step.
"""

from __future__ import annotations

import argparse
import csv
import functools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "data" / "tiny_wan_i2v")]

import promise
import world
from promise_methods import Case, Method, Prior, as_array, from_noise, make_prior, resume

from step_skip.method.formation import DEFAULT_TEXT_SHARE, influence_left, part_distances, text_moves
from step_skip.models.weights import model_defaults

STEPS = 10  # of the priors and of the full run
KINDS = {"motion": "another motion's", "empty": "neutral"}
PROMPTS = {"motion": "old", "empty": "empty"}  # whose context
STATISTICS = {  # each is the larger, the earlier the step
    "text_left": "the text's say that is left",
    "moving_distance": "moving part that has not formed",
    "still_distance": "still part that has not formed",
    "sigma": "noise that is left (sigma: the schedule alone)",
}
COLUMNS = (
    *("index", "seed", "cfg_scale", "old_motion", "new_motion"),
    *("prior", "start_step", "shown", "obeyed"),
    *STATISTICS,
)
SHARES = (0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4)
COLOURS = {"motion": "#c0392b", "empty": "#2471a3"}


# --- the clips ----------------------------------------------------------------------------------------------


def statistics(prior: Prior) -> Iterator[dict[str, float]]:
    """What a prior's own run says after each of its steps."""
    sigmas = prior.sigmas
    moves = text_moves(prior.branch_distances, sigmas=sigmas, cfg_scale=1.0)  # one scale, no part in a share
    left, _ = influence_left(moves, sigmas=sigmas)
    steps = zip(prior.latents, sigmas, prior.noise_pred, strict=False)  # the clean latents begin none
    denoised = (latents - sigma * noise_pred for latents, sigma, noise_pred in steps)
    formed = part_distances(denoised, prior.latents[-1])
    for step, sigma in enumerate([*sigmas[1:], 0.0]):
        yield {
            "text_left": left[step],
            "moving_distance": formed["moving_distances"][step],
            "still_distance": formed["still_distances"][step],
            "sigma": sigma,
        }


def measure_case(case: Case) -> Iterator[dict]:
    """The full run of the new motion (start_step -1), then each prior resumed after every step."""
    keys = {
        "index": case.index,
        "seed": case.seed,
        "cfg_scale": case.settings.cfg_scale,
        "old_motion": case.old_motion,
        "new_motion": case.new_motion,
    }
    yield keys | {"prior": "none", "start_step": -1} | judge(case, from_noise(case, None, steps=STEPS))
    for kind in KINDS:
        prior = make_prior(case, PROMPTS[kind], STEPS)
        for start_step, numbers in enumerate(list(statistics(prior))[:-1]):
            judged = judge(case, resume(case, prior, start_step=start_step))
            rounded = {name: round(number, 5) for name, number in numbers.items()}
            yield keys | {"prior": kind, "start_step": start_step} | judged | rounded


def judge(case: Case, result) -> dict:
    """The motion that a clip shows, and whether it is the one asked for."""
    shown = world.measure(as_array(result.frames), case.identity).motion
    return {"shown": shown, "obeyed": int(shown == case.new_motion)}


def work(job: promise.Job) -> list[dict]:
    """All lines of one case."""
    return list(measure_case(promise.make_case(*promise._worker, *job[:3])))


# --- what they say ------------------------------------------------------------------------------------------


def judged_clips(path: Path) -> list[dict]:
    """The resumed clips of the cases whose full run obeys, numbers as numbers."""
    rows = list(csv.DictReader(path.open()))
    able = {row["index"] for row in rows if row["prior"] == "none" and row["obeyed"] == "1"}
    numbers = ("index", "start_step", "obeyed", *STATISTICS)
    clips = [row for row in rows if row["prior"] != "none" and row["index"] in able]
    return [clip | {name: float(clip[name]) for name in numbers} for clip in clips]


def of_kind(clips: Iterable[dict], *kinds: str) -> list[dict]:
    """The clips of some priors."""
    return [clip for clip in clips if clip["prior"] in kinds]


def auc(clips: list[dict], name: str) -> tuple[float, int]:
    """The share of pairs, one obeyed and one not, that a statistic puts in order, and their number."""
    values = np.array([clip[name] for clip in clips])
    obeyed = np.array([clip["obeyed"] for clip in clips], bool)
    difference = values[obeyed][:, None] - values[~obeyed]
    return float(
        ((difference > 0) + 0.5 * (difference == 0)).mean()
    ) if difference.size else 0.0, difference.size


def auc_within(clips: list[dict], name: str) -> float:
    """The same among pairs at one start step: does it tell priors apart, not only early from late?"""
    steps = {clip["start_step"] for clip in clips}
    parts = [auc([clip for clip in clips if clip["start_step"] == step], name) for step in steps]
    pairs = sum(number for _, number in parts)
    return sum(value * number for value, number in parts) / pairs if pairs else float("nan")


def logistic(clips: list[dict], name: str) -> np.ndarray:
    """Offset and slope of P(obeyed) = 1 / (1 + exp(-offset - slope x)): Newton's method, a little ridge."""
    x = np.stack([np.ones(len(clips)), [clip[name] for clip in clips]], 1)
    y, weights = np.array([clip["obeyed"] for clip in clips]), np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ weights))
        hessian = x.T @ (x * (p * (1 - p))[:, None]) + 1e-3 * np.eye(2)
        weights = weights + np.linalg.solve(hessian, x.T @ (y - p) - 1e-3 * weights)
    return weights


def needed(weights: np.ndarray, obeyed: float) -> float:
    """Where the logistic fit reaches this share of obeyed clips."""
    return float((np.log(obeyed / (1 - obeyed)) - weights[0]) / weights[1])


def picks(clips: list[dict], text_share: float) -> list[dict]:
    """What `auto` chooses in every prior, and the latest step at which the new motion is obeyed."""
    priors: dict[tuple[float, str], list[dict]] = {}
    for clip in clips:
        priors.setdefault((clip["index"], clip["prior"]), []).append(clip)
    found = []
    for (index, kind), members in priors.items():
        enough = [clip for clip in members if clip["text_left"] >= text_share]
        chosen = max(enough, key=lambda clip: clip["start_step"], default=None)
        best = max((clip["start_step"] for clip in members if clip["obeyed"]), default=-1)
        found.append({"index": int(index), "prior": kind, "chosen": chosen, "best": int(best)})
    return found


# --- the report ---------------------------------------------------------------------------------------------


def table(head: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    """A markdown table."""
    head = list(head)
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows) + "\n"


def by_step(clips: list[dict]) -> Iterator[list]:
    """Obedience and the mean of every statistic after each step."""
    for kind in KINDS:
        for step in range(STEPS - 1):
            members = [clip for clip in of_kind(clips, kind) if clip["start_step"] == step]
            means = [np.mean([clip[name] for clip in members]) for name in ("obeyed", *STATISTICS)]
            yield [KINDS[kind], step, *(f"{mean:.2f}" for mean in means)]


def by_statistic(clips: list[dict]) -> Iterator[list]:
    """How well each statistic predicts obedience."""
    for name, label in STATISTICS.items():
        cells = [label]
        for kinds in (("motion",), ("empty",), tuple(KINDS)):
            members = of_kind(clips, *kinds)
            cells.append(f"{auc(members, name)[0]:.3f} / {auc_within(members, name):.2f}")
        weights = logistic(clips, name)
        yield [*cells, *(f"{needed(weights, obeyed):.2f}" for obeyed in (0.5, 0.75, 0.9))]


def by_share(clips: list[dict], shares: Iterable[float]) -> Iterator[list]:
    """What `auto` would do at other shares."""
    for share in shares:
        cells = [f"{share:g}"]
        for kind in KINDS:
            found = picks(of_kind(clips, kind), share)
            chosen = [each["chosen"] for each in found if each["chosen"] is not None]
            steps = [clip["start_step"] for clip in chosen]
            apart = [
                each["chosen"]["start_step"] - each["best"] for each in found if each["chosen"] is not None
            ]
            if not chosen:
                cells += ["", "", "", len(found)]
                continue
            obeyed = np.mean([clip["obeyed"] for clip in chosen])
            off = f"{np.mean(np.abs(apart)):.1f} ({np.mean(apart):+.1f})"
            cells += [f"{np.mean(steps):.1f}", f"{obeyed:.2f}", off, len(found) - len(chosen)]
        yield cells


def summary(clips: list[dict], text_share: float) -> str:
    """The whole report."""
    identities = len({clip["index"] for clip in clips})
    best = max(STATISTICS, key=lambda name: auc(clips, name)[0])
    named = "AUC / at one step"
    text = f"{identities} identities whose full run obeys, two priors each, resumed after every step.\n\n"
    text += table(("prior", "start step", "obeyed", *STATISTICS.values()), by_step(clips))
    text += (
        "How well each predicts obedience. AUC: share of pairs of clips, one obeyed and one not, that it "
        "puts in order; at one step: of pairs with one start step, where 0.5 is chance and the schedule has "
        "nothing to say. Then where a logistic fit to both kinds of prior sees 1/2, 3/4 and 9/10 obeyed. "
        f"The best of them by AUC over all clips: {STATISTICS[best]}.\n\n"
    )
    head = (
        f"{KINDS['motion']} prior: {named}",
        f"neutral prior: {named}",
        f"both: {named}",
        "1/2",
        "3/4",
        "9/10",
    )
    text += table(("statistic", *head), by_statistic(clips))
    text += (
        "`--start_step auto` at several `--text_share`s: mean step, share obeyed, how far from the best "
        "(latest obeyed) step, absolute and signed, and in how many priors no step leaves as much: there it "
        "refuses.\n\n"
    )
    columns = ("step", "obeyed", "off by", "refused")
    head = [f"{KINDS[kind]} prior: {column}" for kind in KINDS for column in columns]
    text += table(("text_share", *head), by_share(clips, sorted({*SHARES, text_share}, reverse=True)))
    text += f"Every prior at `--text_share` {text_share:g}:\n\n"
    head = ("identity", "prior", "auto", "say left", "best step", "off by", "obeyed")
    return text + table(head, map(pick_cells, picks(clips, text_share)))


def pick_cells(pick: dict) -> list:
    """One prior's line of the last table."""
    chosen, begin = pick["chosen"], [pick["index"], KINDS[pick["prior"]]]
    if chosen is None:
        return [*begin, "refused", "", pick["best"], "", ""]
    step = int(chosen["start_step"])
    off = f"{step - pick['best']:+d}"
    return [*begin, step, f"{chosen['text_left']:.2f}", pick["best"], off, int(chosen["obeyed"])]


def plot(clips: list[dict], text_share: float, path: Path) -> None:
    """Obedience over the step, and over the share of the text's say that is left, with its logistic fit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    over_step, over_share = figure.subplots(1, 2, sharey=True)
    x = np.linspace(0.05, 1, 100)
    for kind, colour in COLOURS.items():
        members = of_kind(clips, kind)
        steps = range(STEPS - 1)
        obeyed = [np.mean([c["obeyed"] for c in members if c["start_step"] == step]) for step in steps]
        left = [np.mean([c["text_left"] for c in members if c["start_step"] == step]) for step in steps]
        over_step.plot(steps, obeyed, "o-", color=colour, label=f"{KINDS[kind]} prior")
        weights = logistic(members, "text_left")
        over_share.plot(left, obeyed, "o", color=colour)
        over_share.plot(x, 1 / (1 + np.exp(-weights[0] - weights[1] * x)), color=colour)
    over_share.axvline(text_share, color="grey", ls=":", label=f"--text_share {text_share:g}")
    over_step.set(xlabel="start step", ylabel="new motion obeyed", ylim=(-0.03, 1.03))
    over_share.set(xlabel="the text's say that is left", xlim=(1.02, 0))
    for axes in (over_step, over_share):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--identities", type=int, default=24, help="unseen identities (default: 24)")
    parser.add_argument(
        "--text_share",
        type=float,
        default=DEFAULT_TEXT_SHARE,
        help="the share to report every prior at (default: infer_from_prior.py's)",
    )
    parser.add_argument("--output", type=Path, default=HERE / "out" / "auto_step")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--report_only", action="store_true", help="only redo summary and plot")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Make the clips that are missing, then report."""
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "clips.csv"
    if not args.report_only:
        resumed = functools.partial(resume, start_step=list(range(STEPS - 1)))
        promise.check_same_setup(
            args.output / "setup.json", [Method("resume", resumed, kind) for kind in KINDS]
        )
        cfg_scale = model_defaults("tiny").cfg_scale
        jobs = [(index, index, cfg_scale, "") for index in range(args.identities)]
        promise.run_cases(jobs, path, workers=args.workers, work=work, columns=COLUMNS)
    clips = judged_clips(path)
    if not clips:
        sys.exit("auto_step.py: error: no identity's full run obeys; take more --identities")
    text = summary(clips, args.text_share)
    (args.output / "summary.md").write_text(text)
    plot(clips, args.text_share, args.output / "obeyed.png")
    print(text)


if __name__ == "__main__":
    main()
