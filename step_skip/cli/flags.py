"""Flags of both scripts that say where weights lie and what computes."""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from step_skip.cli.terminal import one_line
from step_skip.files.bounds import LIMITS, MAX_STEPS, is_utf8
from step_skip.files.tensors import DTYPES
from step_skip.infer.choices import AUTO
from step_skip.method.closeness import CLOSENESS
from step_skip.models.compute import OFF, QUANTIZATIONS
from step_skip.models.families import MODEL_NAMES
from step_skip.models.lora import parse_lora, parse_strengths
from step_skip.models.lora_file import Lora
from step_skip.models.memory import HOMES
from step_skip.models.weights import LoadOptions

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


# --- flags --------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's lines and adds "(default: ...)" where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default  # 0 is one to show; a list's help shows what is in it
        if default in (None, "", argparse.SUPPRESS) or default is False or isinstance(default, list):
            return action.help
        return super()._get_help_string(action)


class Removed(argparse.Action):
    """A flag of an earlier version: refused with the reason, which is its help, and not shown in --help."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, help: str):
        super().__init__(option_strings, dest, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.reason = help

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        """Refuse the flag.

        Raises:
            SystemExit: always, with the parser's exit code for a wrong flag.
        """
        parser.error(f"{self.option_strings[0]} was removed: {self.reason}")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """To stdout, which `run_script` keeps for results: here the help is what was asked for."""
        super().print_help(file or sys.__stdout__)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (--help explains every flag)\n")


def add_model_arguments(
    parser: argparse.ArgumentParser, *, model: str | None, model_help: str, dtype_help: str
) -> None:
    """Add --model, --model_dir, --device and --dtype."""
    group = parser.add_argument_group("model and device")
    group.add_argument("--model", choices=MODEL_NAMES, default=model, help=model_help)
    group.add_argument(
        "--model_dir",
        type=Path,
        metavar="DIR",
        help="folder of downloaded weights, laid out flat or as ModelScope does; for tiny a folder with "
        "config.json, tokenizer and weights (default: DiffSynth fetches them, by its own environment "
        "variables, DIFFSYNTH_MODEL_BASE_PATH for example; tiny: data/tiny_wan_i2v)",
    )
    group.add_argument(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:1 ... (default: CUDA where there is one, else the CPU)",
    )
    group.add_argument("--dtype", choices=DTYPES, help=dtype_help)


def add_cheaper_arguments(
    parser: argparse.ArgumentParser, *, lora_type: Callable[[str], Any], lora_help: str
) -> None:
    """Add --skip_cache, --tea_cache_l1_thresh, --tea_cache_model_id and --lora."""
    group = parser.add_argument_group(
        "cheaper steps", "nearly the same result for less; a resumed run inherits only the LoRAs"
    )
    group.add_argument(
        "--skip_cache",
        type=period,
        metavar="N",
        help="run all blocks of the network in every N-th step that runs, from the first one on; the steps "
        "between run the first and the last block and use again what the others added. Where steps are far "
        "apart, as in --steps, what is used again is as old; with 3 of 10 steps the last is a full one",
    )
    group.add_argument(
        "--tea_cache_l1_thresh",
        type=positive_float,
        metavar="X",
        help="DiffSynth's TeaCache: skip all blocks until the timestep's embedding has changed by so much; "
        "the first and the last step that run are full ones",
    )
    group.add_argument(
        "--tea_cache_model_id",
        metavar="ID",
        help="whose coefficients TeaCache takes (default: the model's own; tiny has none)",
    )
    group.add_argument(
        "--lora",
        type=lora_type,
        nargs="*",
        metavar="[high=|low=]PATH[:ALPHA]",
        help=f"LoRAs for the DiT, of two experts for both unless high= or low= names one; {lora_help}",
    )


def check_quotes(parser: argparse.ArgumentParser, argv: list[str] | None, prompts: list[str] | None) -> None:
    """Refuse several prompts of one word each after one --prompt: the quotes were forgotten."""
    words = sys.argv[1:] if argv is None else argv
    prompts = prompts or []
    if len(prompts) > 1 and words.count("--prompt") == 1 and all(len(each.split()) < 2 for each in prompts):
        quoted = own_command(quote_prompt(words, prompts))
        parser.error(
            f"--prompt: {len(prompts)} prompts of one word each; if they are one, quote it: {quoted}; "
            "if not, give each a --prompt of its own"
        )


def given_flags(argv: list[str] | None) -> set[str]:
    """The flags on the command line, whatever their values; None: the script's own."""
    words = sys.argv[1:] if argv is None else argv
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def options_of_flags(args: argparse.Namespace) -> LoadOptions:
    """The flags of `add_model_arguments`, --lora, --vram, --quantize and --compile, with every default."""
    loras = tuple(args.lora or ())
    computes = (args.quantize, args.compile)
    return LoadOptions(args.model, args.device, args.dtype, args.vram, args.model_dir, loras, *computes)


# --- types of flags -----------------------------------------------------------------------------------------


def lora_argument(text: str) -> Lora:
    """An argparse type: PATH or PATH:ALPHA."""
    try:
        return parse_lora(utf8_text(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def lora_strengths(text: str) -> list[Lora]:
    """An argparse type: PATH, PATH:ALPHA or, to be tried in turn, PATH:ALPHA,ALPHA."""
    try:
        return parse_strengths(utf8_text(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _number(kind: Callable[[str], Any], text: str, what: str) -> Any:
    """int(text) or float(text), and in words what it should have been."""
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None


def positive_int(text: str) -> int:
    """An argparse type: 1, 2, 3 ..."""
    value = _number(int, text, "a whole number above 0")
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a whole number above 0")
    return value


def non_negative_int(text: str) -> int:
    """An argparse type: 0, 1, 2 ..."""
    value = _number(int, text, "a whole number")
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def period(text: str) -> int:
    """An argparse type: 2, 3, 4 ..."""
    value = positive_int(text)
    if value == 1:
        raise argparse.ArgumentTypeError("every step would be a full one: leave the flag out")
    return value


def start_steps(text: str) -> list[int | str]:
    """An argparse type: 6, 2-8 for 2 to 8, auto, or several of them between commas."""
    return _ranges(text, non_negative_int)


def numbers_of_steps(text: str) -> list[int | str]:
    """An argparse type: 3, 2-4 for 2 to 4, auto, or several of them between commas."""
    return _ranges(text, positive_int)


def _ranges(text: str, kind: Callable[[str], int]) -> list[int | str]:
    values: list[int | str] = []
    for part in text.split(","):
        ends = re.fullmatch(r"(\d+)-(\d+)", part)
        if part == AUTO:
            values.append(AUTO)
            continue
        first, last = map(kind, ends.groups()) if ends else [kind(part)] * 2
        if not first <= last < MAX_STEPS:
            raise argparse.ArgumentTypeError(f"{part} is no range of steps; write 2-8 for 2 to 8")
        values += range(first, last + 1)
    return values


def alternatives(text: str) -> list[float]:
    """An argparse type: a number above 0, or several between commas, to be tried in turn."""
    return [positive_float(part) for part in text.split(",")]


def closeness(text: str) -> float:
    """An argparse type: draft, good, best, or a PSNR in dB."""
    return CLOSENESS[text] if text in CLOSENESS else positive_float(text)


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = _number(float, text, "a number above 0")
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def strength(text: str) -> float:
    """An argparse type: a number above 0, at most 1."""
    value = positive_float(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is above 1")
    return value


def utf8_text(text: str) -> str:
    """An argparse type: text that can be written as UTF-8 (a shell may pass any bytes)."""
    if not is_utf8(text):
        raise argparse.ArgumentTypeError("the text is not valid UTF-8")
    return text


def utf8_path(text: str) -> Path:
    """An argparse type: a path whose name can be printed and written down as UTF-8."""
    return Path(utf8_text(text))


def limited(name: str, kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type: a value of `kind` within the LIMITS of `name`."""
    least, most = LIMITS[name]

    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not in the range {least} to {most}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it when `kind` fails
    return parse


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
        choices=(*QUANTIZATIONS, OFF) if inherits else QUANTIZATIONS,
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
        type=positive_int,
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


def own_command(words: Iterable[object]) -> str:
    """The script that runs, with these words, as a shell takes it."""
    script = Path(sys.argv[0])
    start = ["python", sys.argv[0]] if script.suffix == ".py" else [script.name]
    return shlex.join([*start, *map(str, words)])


def quote_prompt(words: list[str], prompts: list[str]) -> list[str]:
    """A command line's words, with the prompts after --prompt as one."""
    begin = words.index("--prompt") + 1
    return [*words[:begin], " ".join(prompts), *words[begin + len(prompts) :]]
