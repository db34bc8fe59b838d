"""The flags that both scripts share, and the argparse types of all flags."""

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
    """A formatter that keeps the docstring's lines and appends "(default: ...)" if a default can be shown."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default  # 0 is shown; the help of a flag with a list states the default itself
        if default in (None, "", argparse.SUPPRESS) or default is False or isinstance(default, list):
            return action.help
        return super()._get_help_string(action)


class Removed(argparse.Action):
    """The action of a flag that was removed: it is refused with a reason and hidden from --help.

    Args:
        help: the reason.
    """

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
        """Print the help to the real stdout, although `run_script` reserves it for results."""
        super().print_help(file or sys.__stdout__)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and a message of one line."""
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
        help="Folder of downloaded weights, either flat or in ModelScope's layout; for tiny, a folder with "
        "config.json, tokenizer and weights. (default: DiffSynth downloads the weights and follows its own "
        "environment variables, for example DIFFSYNTH_MODEL_BASE_PATH; tiny: data/tiny_wan_i2v)",
    )
    group.add_argument(
        "--device",
        metavar="NAME",
        help="Device to run on: cpu, cuda, cuda:1, ... (default: cuda if available, else cpu)",
    )
    group.add_argument("--dtype", choices=DTYPES, help=dtype_help)


def add_cheaper_arguments(
    parser: argparse.ArgumentParser, *, lora_type: Callable[[str], Any], lora_help: str
) -> None:
    """Add --skip_cache, --tea_cache_l1_thresh, --tea_cache_model_id and --lora."""
    group = parser.add_argument_group(
        "cheaper steps",
        "Nearly the same result at a lower cost. Of these, a clip inherits only the prior's LoRAs.",
    )
    group.add_argument(
        "--skip_cache",
        type=period,
        metavar="N",
        help="Run all blocks of the network only in every N-th of the steps that run, beginning with the "
        "first; N is 2 or more. The steps between run the first and the last block and reuse what the other "
        "blocks added in the last full step. If the steps are far from each other, as with --steps, the "
        "reused values are equally old. Of 3 steps with N = 2 the last is a full one. (default: all steps "
        "are full)",
    )
    group.add_argument(
        "--tea_cache_l1_thresh",
        type=positive_float,
        metavar="X",
        help="DiffSynth's TeaCache: skip all blocks of a step until the embedding of the timestep has "
        "changed by more than X. The first and the last step that run are full ones. (default: no TeaCache)",
    )
    group.add_argument(
        "--tea_cache_model_id",
        metavar="ID",
        help="The model whose coefficients TeaCache uses. (default: the model's own; tiny has none)",
    )
    group.add_argument(
        "--lora",
        type=lora_type,
        nargs="*",
        metavar="[high=|low=]PATH[:ALPHA]",
        help="LoRA files to apply to the DiT, each with strength ALPHA (1 if left out). With two experts a "
        f"LoRA applies to both, unless high= or low= names one. {lora_help}",
    )


def check_quotes(parser: argparse.ArgumentParser, argv: list[str] | None, prompts: list[str] | None) -> None:
    """Refuse several prompts of one word each after a single --prompt: their quotes are probably missing."""
    words = sys.argv[1:] if argv is None else argv
    prompts = prompts or []
    if len(prompts) > 1 and words.count("--prompt") == 1 and all(len(each.split()) < 2 for each in prompts):
        quoted = own_command(quote_prompt(words, prompts))
        parser.error(
            f"--prompt: {len(prompts)} prompts of one word each; if they are one prompt, quote it: {quoted}; "
            "if not, write --prompt before each"
        )


def given_flags(argv: list[str] | None) -> set[str]:
    """Return the names of the flags on a command line; None: the command line of this process."""
    words = sys.argv[1:] if argv is None else argv
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def options_of_flags(args: argparse.Namespace) -> LoadOptions:
    """Return the options to load a model with, from the flags of the model, its LoRAs and the machine."""
    loras = tuple(args.lora or ())
    computes = (args.quantize, args.compile)
    return LoadOptions(args.model, args.device, args.dtype, args.vram, args.model_dir, loras, *computes)


# --- types of flags -----------------------------------------------------------------------------------------


def lora_argument(text: str) -> Lora:
    """Parse PATH or PATH:ALPHA from a flag."""
    try:
        return parse_lora(utf8_text(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def lora_strengths(text: str) -> list[Lora]:
    """Parse PATH, PATH:ALPHA or PATH:ALPHA,ALPHA, which makes a clip with each strength, from a flag."""
    try:
        return parse_strengths(utf8_text(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _number(kind: Callable[[str], Any], text: str, what: str) -> Any:
    """Parse a number by int or float; an error names what was expected."""
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None


def positive_int(text: str) -> int:
    """Parse 1, 2, 3 ... from a flag."""
    value = _number(int, text, "a whole number above 0")
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a whole number above 0")
    return value


def non_negative_int(text: str) -> int:
    """Parse 0, 1, 2 ... from a flag."""
    value = _number(int, text, "a whole number")
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def period(text: str) -> int:
    """Parse 2, 3, 4 ... from a flag."""
    value = positive_int(text)
    if value == 1:
        raise argparse.ArgumentTypeError(
            "1 would run all blocks in every step: give 2 or more, or leave the flag out"
        )
    return value


def start_steps(text: str) -> list[int | str]:
    """Parse 6, 2-8 for 2 to 8, auto, or several of these separated by commas, from a flag."""
    return _ranges(text, non_negative_int)


def numbers_of_steps(text: str) -> list[int | str]:
    """Parse 3, 2-4 for 2 to 4, auto, or several of these separated by commas, from a flag."""
    return _ranges(text, positive_int)


def _ranges(text: str, kind: Callable[[str], int]) -> list[int | str]:
    """Parse numbers of a kind, ranges of them and auto, separated by commas."""
    values: list[int | str] = []
    for part in text.split(","):
        ends = re.fullmatch(r"(\d+)-(\d+)", part)
        if part == AUTO:
            values.append(AUTO)
            continue
        first, last = map(kind, ends.groups()) if ends else [kind(part)] * 2
        if not first <= last < MAX_STEPS:
            raise argparse.ArgumentTypeError(f"{part} is not a range of steps; write 2-8 for 2 to 8")
        values += range(first, last + 1)
    return values


def alternatives(text: str) -> list[float]:
    """Parse numbers above 0 separated by commas, each of which makes a clip, from a flag."""
    return [positive_float(part) for part in text.split(",")]


def closeness(text: str) -> float:
    """Parse draft, good, best or a PSNR in dB from a flag; return it in dB."""
    return CLOSENESS[text] if text in CLOSENESS else positive_float(text)


def positive_float(text: str) -> float:
    """Parse a finite number above 0 from a flag."""
    value = _number(float, text, "a number above 0")
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def strength(text: str) -> float:
    """Parse a number above 0 and at most 1 from a flag."""
    value = positive_float(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is above 1")
    return value


def utf8_text(text: str) -> str:
    """Check that the text of a flag can be encoded as UTF-8; a shell may pass any bytes."""
    if not is_utf8(text):
        raise argparse.ArgumentTypeError("the text is not valid UTF-8")
    return text


def utf8_path(text: str) -> Path:
    """Parse a path that can be printed and recorded as UTF-8 from a flag."""
    return Path(utf8_text(text))


def limited(name: str, kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return an argparse type: it parses a value by `kind` and checks it against the LIMITS of `name`."""
    least, most = LIMITS[name]

    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not in the range {least} to {most}")
        return value

    parse.__name__ = kind.__name__  # argparse's error message names the type by this
    return parse


INHERITED = "(default: the prior's)"


def add_machine_arguments(parser: argparse.ArgumentParser, *, inherits: bool) -> None:
    """Add --vram, --vae_tiling, --quantize and --compile.

    Args:
        inherits: the flags that change the result default to the prior's values.
    """
    group = parser.add_argument_group(
        "memory and speed",
        "All but --vram change the result, at least in its last bits, and are recorded; see\n"
        "docs/machines.md.",
    )
    group.add_argument(
        "--vram",
        choices=("auto", *HOMES),
        default="auto",
        help="Where weights are kept while they are not in use. plain: encoders in host memory, the others "
        "on the GPU; cpu: all in host memory; low: encoders on disk, the others in host memory; disk: all on "
        "disk; auto: the first of these for which there is enough memory.",
    )
    group.add_argument(
        "--vae_tiling",
        dest="tiled",
        type=tiling,
        default=None if inherits else "on",
        metavar="on|off|auto",
        help="How the VAE decodes. on: in overlapping tiles, as DiffSynth does; off: in whole frames, which "
        "halves the work and takes more memory (4 GiB at 480P, 9 GiB at 720P); auto: in whole frames if that "
        f"takes no more memory than the DiT did.{f' {INHERITED}' if inherits else ''}",
    )
    group.add_argument(
        "--quantize",
        choices=(*QUANTIZATIONS, OFF) if inherits else QUANTIZATIONS,
        help="fp8: keep the DiT's blocks in 8 bits, in half the memory; needs torchao."
        f"{f' off: no quantization. {INHERITED}' if inherits else ' (default: no quantization)'}",
    )
    group.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="Compile the DiT's blocks with torch.compile and this BACKEND (inductor if left out). The first "
        "step takes minutes, the others take less time."
        f"{f' off: not compiled. {INHERITED}' if inherits else ' (default: not compiled)'}",
    )


def add_cluster_arguments(parser: argparse.ArgumentParser, *, what: str, reads: str) -> None:
    """Add --ray and --workers.

    Args:
        what: the things that are made.
        reads: the files that the command itself reads.
    """
    group = parser.add_argument_group("many GPUs", "Ray is needed: pip install .[ray]; see docs/cluster.md.")
    group.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help=f"Make the {what} on a Ray cluster, at ADDRESS. Without a value: the cluster that this machine "
        f"belongs to; local: all GPUs of this machine. This command reads the {reads} and writes every file. "
        "(default: in this process)",
    )
    group.add_argument(
        "--workers",
        type=positive_int,
        metavar="N",
        help="Maximum number of workers on the cluster, each with a model of its own. (default: one per GPU; "
        "without GPUs one per CPU)",
    )


def check_cluster_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse --workers without --ray, and flags that don't work with --ray."""
    if args.workers is not None and args.ray is None:
        parser.error("--workers applies to a Ray cluster: give --ray, too")
    if args.ray is not None and args.preview:
        parser.error("--preview does not work with --ray: leave one of them out")


def tiling(text: str) -> bool | str:
    """Parse on as True, off as False and auto as itself from a flag."""
    known: dict[str, bool | str] = {"on": True, "off": False, AUTO: AUTO}
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
    return known[text]


def own_command(words: Iterable[object]) -> str:
    """Return the command line of the running script with these words, quoted for a shell."""
    script = Path(sys.argv[0])
    start = ["python", sys.argv[0]] if script.suffix == ".py" else [script.name]
    return shlex.join([*start, *map(str, words)])


def quote_prompt(words: list[str], prompts: list[str]) -> list[str]:
    """Return a command line's words with the prompts after --prompt joined into one."""
    begin = words.index("--prompt") + 1
    return [*words[:begin], " ".join(prompts), *words[begin + len(prompts) :]]
