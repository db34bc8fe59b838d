"""The errors of this package, and those that cost a job and not the run."""

from __future__ import annotations


class InputError(ValueError):
    """What the user gave cannot be used."""


class RunError(RuntimeError):
    """The input was fine, the run was not (network, memory, non-finite latents)."""


class TakenError(InputError):
    """A name that something has already, and that may not be replaced."""


class DiskError(OSError):
    """A file could not be written; says which."""


JOB_ERRORS = (InputError, RuntimeError, MemoryError, OSError)  # RunError and torch's own are RuntimeErrors
