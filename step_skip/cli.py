"""What both scripts share: flags and prompts files.

Importing this module is cheap; what needs torch is imported inside functions.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from step_skip.closeness import CLOSENESS
from step_skip.command import own_command, quote_prompt
from step_skip.families import MODEL_NAMES
from step_skip.files import DTYPES, InputError
from step_skip.lora import Lora, parse_lora, parse_strengths
from step_skip.models import LoadOptions
from step_skip.plan import Choices
from step_skip.plan_steps import AUTO
from step_skip.schema import LIMITS, MAX_STEPS, is_utf8
from step_skip.terminal import Terminated as Terminated  # the scripts' and tests' door
from step_skip.terminal import one_line
from step_skip.terminal import run_script as run_script

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


def load_options(args: argparse.Namespace) -> LoadOptions:
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


# --- prompts files ------------------------------------------------------------------------------------------


METHOD_FLAGS = ("start_step", "steps", "num_steps", "sigmas")
OVERRIDES = {  # what a JSON line of --prompts_file may set, and the type of each value
    "prompt": utf8_text,
    "negative_prompt": utf8_text,
    "cfg_scale": alternatives,
    "cfg_scale_2": positive_float,
    "start_step": start_steps,
    "steps": non_negative_int,
    "num_steps": numbers_of_steps,
    "closeness": closeness,
    "sigmas": strength,
}
LISTS = ("cfg_scale", "start_step", "steps", "num_steps", "sigmas")  # of those, what may be a list
MAX_PROMPTS_BYTES = 16 * 2**20


def read_choices(args: argparse.Namespace) -> list[Choices]:
    """What infer_from_prior.py's flags ask for, one video each: every prompt x start step x cfg_scale.

    Strengths of LoRAs come one after the other, each with all of these: its weights are loaded once.
    A line's own entries come before the command line's.

    Raises:
        InputError: see `read_prompts`.
    """
    lines = [{"prompt": prompt} for prompt in args.prompt or ()]
    if args.prompts_file is not None:
        lines += read_prompts(args.prompts_file)
    names = {field.name for field in dataclasses.fields(Choices)}
    given = {name: value for name, value in vars(args).items() if name in names} | {"prompt": None}
    loras = [None] if args.lora is None else itertools.product(*args.lora)
    return [
        each
        for lora in loras
        for line in lines or [{}]
        for each in _choices_of_line(given | {"lora": lora}, line)
    ]


def _choices_of_line(given: dict[str, Any], line: dict[str, Any]) -> Iterator[Choices]:
    """One start step or number of steps, and one cfg_scale (or one for each step), at a time."""
    if line.keys() & set(METHOD_FLAGS):
        given = given | dict.fromkeys((*METHOD_FLAGS, "closeness"))
    chosen = given | line
    starts, counts = (itertools.chain(*chosen[name] or [[None]]) for name in ("start_step", "num_steps"))
    scales = itertools.product(*chosen["cfg_scale"]) if chosen["cfg_scale"] else [None]
    for start, count, scale in itertools.product(starts, counts, scales):
        each = {"start_step": start, "num_steps": count, "cfg_scale": None if scale is None else list(scale)}
        yield Choices(**{**chosen, **each})


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The prompts of a file, one per line; {...} is a JSON object of OVERRIDES, # begins a comment.

    Raises:
        InputError: with the line that is wrong.
    """
    if not path.is_file():
        raise InputError(f"--prompts_file {path} is not a file; name a text file, one prompt per line")
    if path.stat().st_size > MAX_PROMPTS_BYTES:
        raise InputError(f"--prompts_file {path} is over {MAX_PROMPTS_BYTES} bytes; name a smaller file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"--prompts_file {path} is not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error
    if is_json_array(text):
        raise InputError(
            f"--prompts_file {path} is a JSON array; write one prompt per line, as text or as "
            '{"prompt": "..."}'
        )
    if "\0" in text:
        raise InputError(f"--prompts_file {path} holds zero bytes, as UTF-16 text does; save it as UTF-8")
    numbered = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    prompts = [
        read_overrides(line, f"--prompts_file {path}, line {number}")
        if line.startswith("{")
        else {"prompt": line}
        for number, line in numbered
        if line and not line.startswith("#")
    ]
    if not prompts:
        raise InputError(f"--prompts_file {path} holds no prompt; write one per line")
    return prompts


def is_json_array(text: str) -> bool:
    """Whether a whole file is one; a prompt may begin with [, too."""
    try:
        return text.lstrip().startswith("[") and isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        return False


def read_overrides(line: str, where: str) -> dict[str, Any]:
    """What one JSON line sets, as the flags of the same names would.

    Raises:
        InputError: no JSON object, an unknown key, or a value the flag wouldn't take.
    """
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} begins with {{ and is not valid JSON ({error}); correct it") from error
    if unknown := given.keys() - OVERRIDES.keys():
        raise InputError(
            f"{where} has the key {sorted(unknown)[0]!r}, expected some of {', '.join(OVERRIDES)}"
        )
    if len(given.keys() & set(METHOD_FLAGS)) > 1:
        raise InputError(f"{where} has more than one of {', '.join(METHOD_FLAGS)}; leave one")
    return {name: read_override(name, value, where) for name, value in given.items()}


def read_override(name: str, value: Any, where: str) -> Any:
    """One value of a JSON line, in the form that argparse gives the flag's.

    Raises:
        InputError: the flag wouldn't take it.
    """
    kind, many = OVERRIDES[name], name in LISTS
    values = value if many and isinstance(value, list) and value else [value]
    try:
        if kind is utf8_text and not isinstance(value, str):
            raise ValueError("not a text")
        taken = [kind(str(each)) for each in values]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise InputError(f"{where}: {name} is {value!r} ({error}); write what --{name} would take") from error
    return taken if many else taken[0]
