"""Clips per minute by workers on a Ray cluster, and what kills cost: nothing may be lost or made twice.

    python benchmarks/cluster.py --output benchmarks/results/cluster.json

Embedded model, one thread each, a cluster of two nodes of one CPU on this machine besides the one that drives
it. Rates are those of the second half of a sweep, so without the seconds in which Ray and the workers start;
sweeps with one worker and with two take turns. Then workers, nodes and the command itself are killed at
random moments, in sweeps of clips and in folders of images, until all is made, and that is compared with what
one process makes. --rounds 0 and --kills 0 leave one of the two as it stands in the output.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from step_skip.files.writing import write_json
from step_skip.models.machine import installed_versions
from step_skip.prior.schema import METADATA_FILE

INPUTS = ROOT / "data" / "tiny_wan_i2v" / "inputs"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
NODE = {"num_cpus": 1, "object_store_memory": 2**28, "include_dashboard": False}
KINDS = ("worker", "worker", "node", "driver")  # as often each is killed
PATIENCE = 30  # times the same command is given


@dataclass
class Task:
    """A command that makes many things, and where each of them ends up."""

    script: str
    flags: list[object]
    pattern: str  # of the file that says that one is whole
    decides: Callable[[dict[str, Any]], object]  # what of such a file is the same wherever it is made

    def start(self, folder: Path, *flags: object) -> subprocess.Popen:
        """The command, with its messages in a file beside the folder."""
        command = [sys.executable, ROOT / self.script, *self.flags, "--output_dir", folder, *flags]
        with folder.with_suffix(".log").open("a") as log:
            return subprocess.Popen([*map(str, command)], stdout=log, stderr=log, env=ENVIRONMENT)

    def made(self, folder: Path) -> dict[str, object]:
        """What there is, by name."""
        files = {str(path.relative_to(folder)): path for path in folder.glob(self.pattern)}
        return {name: self.decides(json.loads(path.read_text())) for name, path in files.items()}

    def run(self, folder: Path, *flags: object) -> dict[str, object]:
        """What the command makes."""
        if self.start(folder, *flags).wait():
            raise SystemExit(folder.with_suffix(".log").read_text())
        return self.made(folder)


@dataclass
class Watch:
    """What was seen to be whole, so that it can't be made again unseen."""

    task: Task
    folder: Path
    seen: dict[str, tuple[int, int]] = field(default_factory=dict)
    again: int = 0

    def look(self) -> None:
        """Note what is there by now."""
        for path in self.folder.glob(self.task.pattern):
            stat = path.stat()
            now = stat.st_ino, stat.st_mtime_ns
            self.again += self.seen.setdefault(path.parent.name + path.name, now) != now
            self.seen[path.parent.name + path.name] = now


def clips(work: Path, *, prompts: int) -> Task:
    """A sweep over one prior."""
    work.mkdir(exist_ok=True)
    flags = ("--model", "tiny", "--prompt", "she stays still", "--image", INPUTS / "mila.png")
    maker = Task("generate_prior.py", list(flags), f"run_*/{METADATA_FILE}", len)
    maker.run(work / "prior")
    words = [f"she moves {number}" for number in range(prompts)]
    swept = ["--prior_dir", work / "prior" / "run_mila", "--num_steps", 4, "--prompt", *words]
    return Task(
        "infer_from_prior.py", swept, "*.json", lambda made: [made["latents_sha256"], made["video_sha256"]]
    )


def priors(*, seeds: int) -> Task:
    """A folder of images."""
    flags = ["--model", "tiny", "--prompt", "she stays still", "--image", INPUTS, "--seed", *range(seeds)]
    pattern = f"run_*/{METADATA_FILE}"

    def decides(made: dict[str, Any]) -> object:
        return made["files"] if made["status"] == "complete" else None

    return Task("generate_prior.py", flags, pattern, decides)


def measure_rates(sweep: Task, work: Path, nodes: Cluster, *, rounds: int) -> dict[str, Any]:
    """Clips per minute with one worker and with two, in turn, and of one process; and the ratio."""
    rates: dict[str, list[float]] = {"1": [], "2": []}
    expected, same = sweep.run(work / "here"), []
    for turn in range(rounds):
        for workers, found in rates.items():
            folder = work / f"workers_{workers}_{turn}"
            same.append(sweep.run(folder, "--ray", nodes.address, "--workers", workers) == expected)
            found.append(rate(sweep, folder))
    one, two = (statistics.median(found) for found in rates.values())
    return {
        "clips": len(expected),
        "clips_per_minute": {"one process": rate(sweep, work / "here"), "by workers": rates},
        "ratio_of_medians": round(two / one, 2),
        "same_as_one_process": all(same),
    }


def rate(task: Task, folder: Path) -> float:
    """How many a minute, of the second half."""
    times = sorted(path.stat().st_mtime for path in folder.glob(task.pattern))
    late = times[len(times) // 2 :]
    return round(60 * (len(late) - 1) / (late[-1] - late[0]), 2)


# --- kills --------------------------------------------------------------------------------------------------


def workers_at_work() -> list[psutil.Process]:
    """The processes that make something at the moment."""
    names = ((each, (each.info["cmdline"] or [""])[0]) for each in psutil.process_iter(["cmdline"]))
    return [each for each, name in names if name.startswith("ray::") and name.endswith("Worker.make")]


def kill(kind: str, process: subprocess.Popen, nodes: Cluster, moments: random.Random) -> bool:
    """Kill a worker, a node (another comes up) or the command; False: nothing was there to be killed."""
    if kind == "driver":
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    found = workers_at_work()
    if not found:
        return False
    if kind == "worker":
        moments.choice(found).kill()
    else:
        nodes.remove_node(moments.choice(nodes.list_all_nodes()[1:]), allow_graceful=False)
        nodes.add_node(**NODE)
    return True


def campaign(
    task: Task, folder: Path, nodes: Cluster, *, kinds: Iterator[str], kills: int, moments: random.Random
) -> dict[str, Any]:
    """Give the same command until all is made, and kill something every few seconds."""
    killed: Counter[str] = Counter()
    watch, times, code = Watch(task, folder), 0, 1
    while code != 0 and times < PATIENCE:
        process, times = task.start(folder, "--ray", nodes.address), times + 1
        due, kind = time.monotonic() + moments.uniform(8, 20), next(kinds)
        while process.poll() is None:
            time.sleep(0.05)
            watch.look()
            at_it = kind == "driver" or watch.seen  # its first moments are for the driver alone
            if killed.total() < kills and time.monotonic() > due and at_it:
                if kill(kind, process, nodes, moments):
                    killed[kind] += 1
                    kind = next(kinds)
                due = time.monotonic() + moments.uniform(1, 8)
        code = process.wait()
    log = folder.with_suffix(".log").read_text()
    return {
        "killed": dict(killed),
        "commands": times,
        "told_as_lost": log.count("a worker was lost"),
        "given_up_and_made_by_the_same_command": log.count(": given up"),
        "made_again": watch.again,
    }


def kill_many(tasks: dict[str, Task], work: Path, nodes: Cluster, *, kills: int) -> dict[str, Any]:
    """A campaign over each kind of thing, with what one process makes of it beside."""
    moments, result = random.Random(0), {}
    for name, task in tasks.items():
        expected = task.run(work / f"{name}_here")
        found: dict[str, Any] = {"things": len(expected), "killed": {}}
        while sum(found["killed"].values()) < kills / len(tasks):
            folder = work / f"{name}_killed_{len(found)}_{sum(found['killed'].values())}"
            left = round(kills / len(tasks)) - sum(found["killed"].values())
            kinds = (moments.choice(KINDS) for _ in iter(int, 1))
            told = campaign(task, folder, nodes, kinds=kinds, kills=left, moments=moments)
            found["killed"] = dict(Counter(found["killed"]) + Counter(told.pop("killed")))
            for entry, value in told.items():
                found[entry] = found.get(entry, 0) + value
            made = task.made(folder)
            found["lost"] = found.get("lost", 0) + len(expected.keys() - made.keys())
            found["other"] = found.get("other", 0) + sum(made[key] != expected.get(key) for key in made)
            found["sweeps"] = found.get("sweeps", 0) + 1
            print(name, found, file=sys.stderr)
        result[name] = found
    return result


def main() -> None:
    """Measure rates, then kill, and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=40, help="of each sweep whose rate is measured")
    parser.add_argument("--rounds", type=int, default=3, help="sweeps with one worker and with two")
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument(
        "--killed_clips", type=int, default=24, help="of each sweep in which something is killed"
    )
    parser.add_argument("--output", type=Path, default=HERE / "out" / "cluster.json")
    args = parser.parse_args()
    about = {
        "command": f"python benchmarks/cluster.py {' '.join(sys.argv[1:])}".strip(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": installed_versions(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result = json.loads(args.output.read_text()) if args.output.exists() else {}
    work = Path(tempfile.mkdtemp())
    nodes = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
    for _ in range(2):
        nodes.add_node(**NODE)
    if args.rounds:
        sweep = clips(work, prompts=args.clips)
        result["rates"] = about | measure_rates(sweep, work, nodes, rounds=args.rounds)
        write_json(args.output, result)
    if args.kills:
        tasks = {"clips": clips(work / "killed", prompts=args.killed_clips), "priors": priors(seeds=2)}
        result["kills"] = about | kill_many(tasks, work / "killed", nodes, kills=args.kills)
        write_json(args.output, result)
    nodes.shutdown()
    shutil.rmtree(work)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
