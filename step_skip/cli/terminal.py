"""How a script speaks and how it ends: the result on stdout, everything else on stderr, an error in one line.

Exit codes: 0 done; 1 the run failed (network, memory, NaN); 2 bad input; 130 interrupted; 143 terminated
(SIGTERM); 129 the terminal went away (SIGHUP).

Names of files, and what priors say, may be a stranger's. A terminal shows them as text: no message is longer
than its line, moves the cursor or turns the direction of what follows.
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

DISK_ERRORS = (  # the disk's or the user's fault, not the program's
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EEXIST,  # where a folder is to be
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
# how torch's allocators say it, and the loader of shared libraries
OUT_OF_MEMORY = re.compile("out of memory|can(no|')t allocate memory|failed to map segment", re.IGNORECASE)
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode's control, format, half and separating characters
MAX_LINE = 10_000  # characters of a message
JOINERS = "\u200c\u200d"  # format characters that scripts and emoji need


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a machine sends before it is taken away: ends a run as Ctrl-C does."""


class HungUp(KeyboardInterrupt):
    """SIGHUP: the terminal was closed."""


SIGNALS = {"SIGINT": KeyboardInterrupt, "SIGTERM": Terminated, "SIGHUP": HungUp}  # by what they raise
SIGNAL_ENDINGS = {
    KeyboardInterrupt: (130, "interrupted"),
    Terminated: (143, "terminated"),
    HungUp: (129, "hung up"),
}


# --- speaking -----------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """A text as a terminal may show it; what would steer the terminal is escaped, as JSON does it."""
    if text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in HIDDEN and c not in JOINERS else c for c in text)


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def one_line(message: str) -> str:
    """A message as `plain` text on one line; a name in it may have megabytes."""
    line = plain(" ".join(message[: MAX_LINE + 1].splitlines()))
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}..."


class MessageHandler(logging.Handler):
    """Tells on stderr what the package has to say, a line each, above a progress bar that may be there."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(f"{prefix}{one_line(record.getMessage())}", file=sys.stderr)


def show_messages() -> None:
    """Let every message of the package reach the user, once."""
    package = logging.getLogger("step_skip")
    package.setLevel(logging.INFO)
    package.handlers = [MessageHandler()]
    package.propagate = False


class Unfailing:
    """A stream whose reader may go away: a run is worth more than what it says of itself."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._do("write", text)
        return len(text)

    def flush(self) -> None:
        self._do("flush")

    def _do(self, what: str, *arguments: str) -> None:
        if self.stream is None:  # closed before Python began
            return
        try:
            getattr(self.stream, what)(*arguments)
        except (OSError, ValueError):
            discard(self.stream)


def discard(stream: TextIO) -> None:
    """Let what is still to be written go nowhere; else the interpreter fails on it at its end."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


# --- ending -------------------------------------------------------------------------------------------------


def run_script(main: Callable[[], Path | str | Iterable[object]]) -> NoReturn:
    """Run a script's main, print what it returns, the path it made, last on stdout, exit with its code.

    What it returns line by line is printed as it comes.
    """
    received: list[type[KeyboardInterrupt]] = []
    _catch_signals(received)
    with contextlib.redirect_stderr(Unfailing(sys.stderr)):
        show_messages()
        try:
            with contextlib.redirect_stdout(sys.stderr):
                result = main()
            code, message = _tell_result([result] if isinstance(result, Path | str) else result)
        except SystemExit:
            raise
        except BaseException as error:
            # an import that a signal cuts short may end in an error of its own
            ending = SIGNAL_ENDINGS[received[0]] if received else ending_of(error)
            if ending is None:
                raise
            code, message = ending
        if message:
            print(f"{Path(sys.argv[0]).name}: error: {one_line(message)}", file=sys.stderr)
        sys.exit(code)


def _catch_signals(received: list[type[KeyboardInterrupt]]) -> None:
    """Raise what SIGNALS says, and note it; what is ignored, under nohup for example, stays so."""
    for name, kind in SIGNALS.items():
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is None or signal.getsignal(number) is signal.SIG_IGN:
            continue

        def interrupt(*_: object, kind: type[KeyboardInterrupt] = kind) -> NoReturn:
            received.append(kind)
            raise kind

        signal.signal(number, interrupt)


def _tell_result(lines: Iterable[object]) -> tuple[int, str]:
    """Print it: to a terminal as plain text, to a program byte for byte; returns exit code and error."""
    if sys.stdout is None:
        deque(lines, maxlen=0)  # what fails on the way still counts
        return 0, ""
    for_people, line = sys.stdout.isatty(), ""
    try:
        sys.stdout.flush()
        for line in map(str, lines):
            shown = "\n".join(map(plain, line.split("\n"))) if for_people else line
            sys.stdout.buffer.write(os.fsencode(shown) + b"\n")  # a path's own bytes, whatever the encoding
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it wanted no more
        discard(sys.stdout)
    except OSError as error:
        discard(sys.stdout)
        return 2, f"cannot write to stdout: {error.strerror}; it would have said: {line}"
    return 0, ""


def ending_of(error: BaseException) -> tuple[int, str] | None:
    """Exit code and message of an error; None: a mistake of the program, which keeps its traceback."""
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
