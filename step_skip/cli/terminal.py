"""The output and the exit codes of a script: the result on stdout, everything else on stderr.

Exit codes: 0 done; 1 the run failed (network, memory, NaN); 2 bad input; 130 interrupted; 143 terminated
(SIGTERM); 129 the terminal was closed (SIGHUP).

File names and the contents of priors are untrusted. They are escaped before they reach a terminal, so that no
message spans several lines, moves the cursor or changes the direction of the text after it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import signal
import sys
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

from step_skip.errors import DiskError, InputError, RunError

DISK_ERRORS = (  # errors of the disk or of a path, not of the program
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EEXIST,  # a file exists at the path of a folder
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EPIPE,
    errno.ESTALE,  # a network drive was disconnected
    errno.ENODEV,
    errno.ENXIO,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
)
# matches the messages of torch's allocators and of the loader of shared libraries
OUT_OF_MEMORY = re.compile("out of memory|can(no|')t allocate memory|failed to map segment", re.IGNORECASE)
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode's control, format, surrogate and separator characters
MAX_LINE = 10_000  # characters of a message
JOINERS = "\u200c\u200d"  # format characters that are part of some scripts and of emoji


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a machine sends before it shuts down; it ends a run as Ctrl-C does."""


class HungUp(KeyboardInterrupt):
    """SIGHUP: the terminal was closed."""


SIGNALS = {"SIGINT": KeyboardInterrupt, "SIGTERM": Terminated, "SIGHUP": HungUp}  # what each raises
SIGNAL_ENDINGS = {
    KeyboardInterrupt: (130, "interrupted"),
    Terminated: (143, "terminated"),
    HungUp: (129, "hung up"),
}


# --- messages -----------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Return a text that is safe for a terminal: control characters are escaped as in JSON."""
    if text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in HIDDEN and c not in JOINERS else c for c in text)


def _escaped(character: str) -> str:
    """Return the JSON escape of a character, one \\uXXXX for each of its UTF-16 units."""
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def one_line(message: str) -> str:
    """Return a message as `plain` text on one line, cut after MAX_LINE characters."""
    line = plain(" ".join(message[: MAX_LINE + 1].splitlines()))
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}..."


class MessageHandler(logging.Handler):
    """A handler that writes each message to stderr in one line, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(f"{prefix}{one_line(record.getMessage())}", file=sys.stderr)


def show_messages() -> None:
    """Show every message of the package on stderr, once."""
    package = logging.getLogger("step_skip")
    package.setLevel(logging.INFO)
    package.handlers = [MessageHandler()]
    package.propagate = False


class FaultTolerantStream:
    """A stream whose write errors are ignored: a run continues if nothing reads its messages any more."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text, and return its length even if the write failed."""
        self._call("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._call("flush")

    def _call(self, method: str, *arguments: str) -> None:
        """Call a method of the stream; after an error discard all further output."""
        if self.stream is None:  # stderr was closed when Python started
            return
        try:
            getattr(self.stream, method)(*arguments)
        except (OSError, ValueError):
            discard(self.stream)


def discard(stream: TextIO) -> None:
    """Redirect a stream to the null device, so that the interpreter's last flush doesn't fail."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


# --- exit codes ---------------------------------------------------------------------------------------------


def run_script(main: Callable[[], Path | str | Iterable[object]]) -> NoReturn:
    """Run a script's main, print its result as the last lines on stdout, and exit with the matching code.

    If the result is an iterable, each of its lines is printed as soon as it is produced.
    """
    received: list[type[KeyboardInterrupt]] = []
    _catch_signals(received)
    with contextlib.redirect_stderr(FaultTolerantStream(sys.stderr)):
        show_messages()
        try:
            with contextlib.redirect_stdout(sys.stderr):
                result = main()
            code, message = _print_result([result] if isinstance(result, Path | str) else result)
        except SystemExit:
            raise
        except BaseException as error:
            # an import that a signal interrupts may raise another error
            ending = SIGNAL_ENDINGS[received[0]] if received else ending_of(error)
            if ending is None:
                raise
            code, message = ending
        if message:
            print(f"{Path(sys.argv[0]).name}: error: {one_line(message)}", file=sys.stderr)
        sys.exit(code)


def _catch_signals(received: list[type[KeyboardInterrupt]]) -> None:
    """Record each of SIGNALS and raise its exception; ignored signals, as under nohup, stay ignored."""
    for name, kind in SIGNALS.items():
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is None or signal.getsignal(number) is signal.SIG_IGN:
            continue

        def interrupt(*_: object, kind: type[KeyboardInterrupt] = kind) -> NoReturn:
            received.append(kind)
            raise kind

        signal.signal(number, interrupt)


def _print_result(lines: Iterable[object]) -> tuple[int, str]:
    """Print the result, escaped on a terminal and unchanged otherwise; return exit code and error message."""
    if sys.stdout is None:
        deque(lines, maxlen=0)  # consume the lines: errors on the way are still raised
        return 0, ""
    is_terminal, line = sys.stdout.isatty(), ""
    try:
        sys.stdout.flush()
        for line in map(str, lines):
            shown = "\n".join(map(plain, line.split("\n"))) if is_terminal else line
            sys.stdout.buffer.write(os.fsencode(shown) + b"\n")  # the bytes of a path, in any encoding
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe
        discard(sys.stdout)
    except OSError as error:
        discard(sys.stdout)
        return 2, f"cannot write to stdout: {error.strerror}; the result is: {line}"
    return 0, ""


def ending_of(error: BaseException) -> tuple[int, str] | None:
    """Return exit code and message of an error; None: a bug of the program, which keeps its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return SIGNAL_ENDINGS[type(error)]
    if isinstance(error, InputError | RunError):
        return (2 if isinstance(error, InputError) else 1), str(error)
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
        return 1, "the device is out of memory; try --vram low, fewer --num_frames or a smaller size"
    if isinstance(error, DiskError) or (isinstance(error, OSError) and error.errno in DISK_ERRORS):
        what = f"{error.filename or 'the output'}: {error.strerror}"
        return 2, f"cannot read or write {what}; use another disk or folder"
    return None
