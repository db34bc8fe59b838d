"""What both scripts share: flags, exit codes, and who may write to stdout.

Results go to stdout, everything else to stderr, DiffSynth's own prints included.
Exit codes: 0 done; 1 the run failed (network, memory, NaN); 2 bad input; 130 interrupted;
143 terminated (SIGTERM).
Importing this module is cheap; what needs torch is imported inside functions.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import math
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from lora import Lora, parse_lora
from prior_utils import (
    DTYPES,
    LIMITS,
    MAX_STEPS,
    DiskError,
    InputError,
    RunError,
    RunSettings,
    is_utf8,
    replacing,
)
from wan_models import MODEL_NAMES, LoadOptions, published_name

if TYPE_CHECKING:
    from PIL.Image import Image

AUTO = "auto"  # a --start_step that each prior decides for itself
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")  # Pillow hands others to programs
MIN_IMAGE_SIDE = 16  # pixels; anything smaller is no picture
DISK_ERRORS = (  # the disk's or the user's fault, not the program's
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EPIPE,
    errno.ESTALE,  # a network drive that went away
    errno.ENODEV,
    errno.ENXIO,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
)


OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory")  # how torch's allocators say it


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a machine sends before it is taken away: ends a run as Ctrl-C does."""


def _terminate(*_: object) -> NoReturn:
    raise Terminated


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's lines and adds "(default: ...)" where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", argparse.SUPPRESS) or action.default is False:  # 0 is one to show
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def print_help(self, file: TextIO | None = None) -> None:
        """To stdout, which `run_script` keeps for results: here the help is what was asked for."""
        super().print_help(file or sys.__stdout__)

    def error(self, message: str) -> NoReturn:
        message = " ".join(message.splitlines())
        self.exit(2, f"{self.prog}: error: {message} (--help explains every flag)\n")


def add_model_arguments(
    parser: argparse.ArgumentParser, *, model: str | None, model_help: str, dtype_help: str
) -> None:
    """Add --model, --model_dir, --device, --dtype and --vram."""
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
    group.add_argument(
        "--vram",
        choices=("auto", "plain", "low"),
        default="auto",
        help="plain: all weights on the GPU; low: offloaded to disk, from 8 GB; auto: plain from 64 GiB free",
    )


def add_cheaper_arguments(parser: argparse.ArgumentParser, *, lora_help: str) -> None:
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
        type=lora_argument,
        nargs="*",
        metavar="PATH[:ALPHA]",
        help=f"LoRAs for the DiT; {lora_help}",
    )


def cheaper_settings(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """skip_cache and TeaCache as RunSettings has them, from the flags of `add_cheaper_arguments`.

    Raises:
        InputError: both at once, or a model without coefficients.
    """
    if args.tea_cache_l1_thresh is None:
        if args.tea_cache_model_id is not None:
            raise InputError("--tea_cache_model_id says nothing without --tea_cache_l1_thresh: give both")
        return {"skip_cache": args.skip_cache, "tea_cache_l1_thresh": None, "tea_cache_model_id": ""}
    if args.skip_cache is not None:
        raise InputError("--skip_cache and --tea_cache_l1_thresh save the same work: give one of them")
    from cheaper_steps import check_tea_cache_model_id

    model_id = args.tea_cache_model_id or published_name(model)
    check_tea_cache_model_id(model_id)
    threshold = args.tea_cache_l1_thresh
    return {"skip_cache": None, "tea_cache_l1_thresh": threshold, "tea_cache_model_id": model_id}


def lora_argument(text: str) -> Lora:
    """An argparse type: PATH or PATH:ALPHA."""
    try:
        return parse_lora(utf8_text(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def given_flags(argv: list[str] | None) -> set[str]:
    """The flags on the command line, whatever their values; None: the script's own."""
    words = sys.argv[1:] if argv is None else argv
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def load_options(args: argparse.Namespace) -> LoadOptions:
    """The flags of `add_model_arguments` and --lora, once every default is filled in."""
    loras = tuple(args.lora or ())
    return LoadOptions(args.model, args.device, args.dtype, args.vram, args.model_dir, loras)


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
    """An argparse type: 6, or 2-8 for 2 to 8, or auto."""
    if text == AUTO:
        return [AUTO]
    ends = re.fullmatch(r"(\d+)-(\d+)", text)
    first, last = map(int, ends.groups()) if ends else [non_negative_int(text)] * 2
    if not first <= last < MAX_STEPS:
        raise argparse.ArgumentTypeError(f"{text} is no range of steps; write 2-8 for 2 to 8")
    return list(range(first, last + 1))


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


def run_script(main: Callable[[], Path | str]) -> NoReturn:
    """Run a script's main, print what it returns, the path it made, last on stdout, exit with its code."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = main()
        print(result, flush=True)
        sys.exit(0)
    except InputError as error:
        _exit(2, str(error))
    except OSError as error:
        if error.errno not in DISK_ERRORS and not isinstance(error, DiskError):
            raise
        what = f"{error.filename or 'the output'}: {error.strerror}"
        _exit(2, f"cannot read or write {what}; use another disk or folder")
    except RunError as error:
        _exit(1, str(error))
    except Terminated:
        _exit(143, "terminated")
    except KeyboardInterrupt:
        _exit(130, "interrupted")
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        _exit(1, "the device is out of memory; try --vram low, fewer --num_frames or a smaller size")


def _exit(code: int, message: str) -> NoReturn:
    program = Path(sys.argv[0]).name
    print(f"{program}: error: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(code)


def say(message: str) -> None:
    """Tell the user something, on stderr."""
    print(message, file=sys.stderr)


def warn(message: str) -> None:
    """Warn the user, on stderr."""
    say(f"warning: {message}")


# --- files the user names -----------------------------------------------------------------------------------


def read_image(path: Path, *, width: int, height: int, label: str = "--image", exact: bool = False) -> Image:
    """Read an image as the model will see it: upright, RGB, stretched to width x height pixels.

    Args:
        label: what an error calls it.
        exact: refuse any other size, before memory is taken for it.

    Raises:
        InputError: no file, not an image, or too small or too large to be one.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise InputError(f"{label} {path} is not a file; name a picture")
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as opened:
            if exact and opened.size != (width, height):
                raise ValueError(f"{opened.width} x {opened.height} pixels, expected {width} x {height}")
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except UnidentifiedImageError:
        raise InputError(f"{label} {path} is not an image that can be read; use PNG, JPEG or WebP") from None
    except Exception as error:  # Pillow's readers raise whatever they meet in a broken file
        raise InputError(
            f"{label} {path} cannot be read ({str(error)[:100] or type(error).__name__}); "
            "save it again as PNG or JPEG"
        ) from error
    if min(image.size) < MIN_IMAGE_SIDE:
        raise InputError(
            f"{label} {path} is {image.width} x {image.height} pixels, expected {MIN_IMAGE_SIDE} or more "
            "a side; use a larger picture"
        )
    if abs(math.log(image.width * height / (image.height * width))) > math.log(1.1):
        warn(f"{path} ({image.width} x {image.height}) is stretched to {width} x {height}; crop it first")
    return image.resize((width, height))


def read_video(path: Path, *, width: int, height: int, num_frames: int) -> list[Image]:
    """Read the first `num_frames` frames of a video, cropped and scaled to width x height pixels.

    Raises:
        InputError: no file, not a video, or too few frames.
    """
    if not path.is_file():
        raise InputError(f"--input_video {path} is not a file; name a video")
    from diffsynth.utils.data import VideoData

    try:
        video = VideoData(str(path), height=height, width=width)
        found = len(video)
        frames = [video[i] for i in range(min(found, num_frames))]
    except Exception as error:  # imageio and ffmpeg raise whatever they like for a broken file
        raise InputError(
            f"--input_video {path} is not a video that can be read ({type(error).__name__}); "
            "save it again as MP4"
        ) from error
    if found < num_frames:
        raise InputError(
            f"--input_video {path} has {found} frames, expected {num_frames}; lower --num_frames"
        )
    return frames


def write_video(frames: list[Image], path: Path, *, fps: float) -> None:
    """Write frames as an .mp4 (H.264), whole or not at all."""
    import imageio
    import numpy as np

    cut_off = OSError(errno.EIO, "ffmpeg wrote only a part of it, its own message is above", str(path))
    with replacing(path) as temporary:
        try:
            with imageio.get_writer(temporary, fps=fps, quality=8) as writer:
                for frame in frames:
                    writer.append_data(np.asarray(frame))
        except OSError as error:
            raise cut_off from error
        if not is_whole_mp4(temporary):  # imageio doesn't look at ffmpeg's exit code
            raise cut_off


def video_bytes(settings: RunSettings) -> int:
    """A safe upper bound of a video's size on disk: a quarter of its raw frames."""
    return settings.num_frames * settings.height * settings.width * 3 // 4


def is_whole_mp4(path: Path) -> bool:
    """Whether a file is a row of whole MP4 boxes, the index (moov) that ffmpeg writes last among them."""
    kinds, place, size = set(), 0, path.stat().st_size
    with path.open("rb") as file:
        while place < size:
            file.seek(place)
            head = file.read(16)  # length, kind and, where the length is 1, the length again in 64 bits
            length = int.from_bytes(head[:4], "big")
            place += max(8, int.from_bytes(head[8:], "big") if length == 1 else length)
            kinds.add(head[4:8])
    return place == size and b"moov" in kinds


def check_folder(folder: Path, needed: int) -> None:
    """Refuse to start what could not be written there. Nothing is left behind, no folder is made yet.

    Args:
        folder: where files will be written; it may have to be made.
        needed: bytes.

    Raises:
        InputError: no file can be made there, or less space is free.
    """
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {there}: {error.strerror}; name a folder that can be written"
        ) from error
    free = shutil.disk_usage(there).free
    if free < needed:
        raise InputError(
            f"{there} has {free / 2**20:.0f} MiB free, and this needs {needed / 2**20:.0f}; "
            "free some space or write to another disk"
        )


# --- where the numbers come from ----------------------------------------------------------------------------


def machine(device: str) -> dict[str, Any]:
    """What a run's last bits depend on besides versions: the device, its name, and the CPU's threads."""
    import platform

    import torch

    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"device": device, "device_name": name, "num_threads": torch.get_num_threads()}


def versions() -> dict[str, Any]:
    """Versions of what decides a run's numbers."""
    import platform
    from importlib.metadata import version

    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffsynth": version("diffsynth"),
        "numpy": version("numpy"),
        "pillow": version("pillow"),
    }


def not_as_then(
    metadata: Mapping[str, Any], device: str, names: Iterable[str]
) -> Iterator[tuple[str, Any, Any]]:
    """What of `machine` and `versions` is not as when a prior was made: name, now, then."""
    then, now = metadata["versions"] | metadata, versions() | machine(device)
    for name in names:
        if now[name] != then.get(name):
            yield name, now[name], then.get(name)
