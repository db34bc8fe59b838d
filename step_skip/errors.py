"""Define the errors of this package, and list those that end one job of a sweep but not the sweep."""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be used: a flag, a file, an image or a prior."""


class RunError(RuntimeError):
    """A run that failed on valid input (network, memory, non-finite latents)."""


class TakenError(InputError):
    """A path that already exists and may not be replaced."""


class DiskError(OSError):
    """A file that could not be written; `filename` holds its path."""


# Errors that end one job and not the run; RunError and torch's own errors are RuntimeErrors.
JOB_ERRORS = (InputError, RuntimeError, MemoryError, OSError)
