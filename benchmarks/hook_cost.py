"""What saving a prior costs: run_full with every step saved against the bare WanVideoPipeline call.

    python benchmarks/hook_cost.py --runs 20

Both in one process on one loaded model, in turn, after a warm-up; prints the median of the ratios pair by
pair and writes --output. The video file is left out of both: the bare call writes none.
Takes a few minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
os.environ["TQDM_DISABLE"] = "1"

import generate_prior
from step_skip.cli.flags import options_of_flags
from step_skip.cli.prior_flags import read_prior_choices
from step_skip.files.writing import write_json
from step_skip.generate.plan import plan_prior
from step_skip.generate.run import save_start, save_step
from step_skip.media.images import fit_image, open_image
from step_skip.models.loading import load_components
from step_skip.models.machine import installed_versions, pick_device
from step_skip.models.weights import family_name
from step_skip.prior.prior import Prior
from step_skip.prior.writer import PriorWriter


def seconds(function, *args) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    function(*args)
    return time.perf_counter() - started


def main() -> None:
    """Time both in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--image", type=Path, default=ROOT / "data" / "tiny_wan_i2v" / "inputs" / "mila.png")
    parser.add_argument("--output", type=Path, default=HERE / "out" / "hook_cost.json")
    own, flags = parser.parse_known_args()
    args = generate_prior.parse_args(["--model", "tiny", "--image", str(own.image), *flags])
    args.device = pick_device(args.model, args.device)
    options = options_of_flags(args)
    choices, family = read_prior_choices(args), family_name(args.model)
    planned = Prior(own.output, plan_prior(options, choices, family=family))
    settings = planned.settings
    image = fit_image(open_image(own.image), width=settings.width, height=settings.height)
    pipe = load_components(options, planned.family.components).pipe

    from step_skip.pipeline.run import run_full
    from step_skip.pipeline.settings import TILING

    prompts = {"prompt": args.prompt[0], "negative_prompt": planned.metadata.negative_prompt}
    inputs = prompts | {"input_image": image}

    def bare() -> None:
        pipe(**inputs, **settings.pipeline_inputs, **TILING)

    def saving(folder: str) -> None:
        writer = PriorWriter(Path(folder), planned.metadata.model_copy(update=prompts))
        run_full(
            pipe,
            settings,
            **inputs,
            on_start=lambda *start: save_start(writer, *start),
            on_step=lambda step: save_step(writer, step),
        )

    pairs = []
    for run in range(own.runs + 1):
        with tempfile.TemporaryDirectory() as folder:
            if run % 2:  # each goes first in turn
                pairs.append((seconds(bare), seconds(saving, folder)))
            else:
                pairs.append((seconds(saving, folder), seconds(bare))[::-1])
    pairs = pairs[1:]  # the first pair warms up
    ratios = [with_saving / without for without, with_saving in pairs]
    result = {
        "runs": own.runs,
        "bare_seconds": statistics.median(pair[0] for pair in pairs),
        "saving_seconds": statistics.median(pair[1] for pair in pairs),
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "size": f"{settings.width} x {settings.height}, {settings.num_frames} frames",
        "device": args.device,
        "cores": os.cpu_count(),
        "versions": installed_versions(),
    }
    own.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(own.output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
