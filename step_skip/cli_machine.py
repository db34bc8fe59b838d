"""Flags of both scripts that say where weights lie and what computes."""

from __future__ import annotations

import argparse

from step_skip import cli
from step_skip.compute import METHODS, OFF
from step_skip.memory import HOMES
from step_skip.plan_steps import AUTO

INHERITED = "(default: the prior's)"


def add_machine_arguments(parser: argparse.ArgumentParser, *, inherits: bool) -> None:
    """Add --vram, --vae_tiling, --quantize and --compile.

    Args:
        inherits: whether what changes the result is a prior's unless told otherwise.
    """
    group = parser.add_argument_group(
        "memory and speed", "docs/machines.md; all but --vram change the last bits or more, and are recorded"
    )
    group.add_argument(
        "--vram",
        choices=("auto", *HOMES),
        default="auto",
        help="where weights lie that are not at work; plain: encoders in host memory, the rest on the GPU; "
        "cpu: all in host memory; low: encoders on the disk, the rest in host memory; disk: all on the disk; "
        "auto: the first of these that has the room",
    )
    group.add_argument(
        "--vae_tiling",
        dest="tiled",
        type=tiling,
        default=None if inherits else "on",
        metavar="on|off|auto",
        help="on: decode in overlapping tiles, as DiffSynth does; off: whole frames, in half the work, for "
        "more memory (4 GiB at 480P, 9 at 720P); auto: whole frames where that takes no more than the DiT "
        f"did {INHERITED if inherits else ''}",
    )
    group.add_argument(
        "--quantize",
        choices=(*METHODS, OFF) if inherits else METHODS,
        help="fp8: the DiT's blocks in 8 bits, half the memory; needs torchao "
        f"{INHERITED if inherits else ''}",
    )
    group.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="torch.compile the DiT's blocks; the first step takes minutes, the others less "
        f"{INHERITED + '; off: not' if inherits else ''}",
    )


def add_cluster_arguments(parser: argparse.ArgumentParser, *, what: str, reads: str) -> None:
    """Add --ray and --workers.

    Args:
        what: is made.
        reads: what the command itself reads.
    """
    group = parser.add_argument_group("many GPUs", "docs/cluster.md; needs Ray: pip install .[ray]")
    group.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help=f"make the {what} on a Ray cluster (default: the one here; local: all GPUs of this machine); "
        f"this command reads the {reads} and writes every file",
    )
    group.add_argument(
        "--workers",
        type=cli.positive_int,
        metavar="N",
        help="at most so many, each with a model of its own (default: one per GPU)",
    )


def check_cluster_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what goes with no cluster."""
    if args.workers is not None and args.ray is None:
        parser.error("--workers are those of a Ray cluster: give --ray, too")
    if args.ray is not None and args.preview:
        parser.error("--preview is not shown by the workers of --ray: leave it out")


def tiling(text: str) -> bool | str:
    """An argparse type: on is True, off False, auto itself."""
    known: dict[str, bool | str] = {"on": True, "off": False, AUTO: AUTO}
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(known)}")
    return known[text]
