"""What goes wrong in ways a user can mend: each message is one line that says found, expected, what to do."""


class InputError(ValueError):
    """What the user gave cannot be used."""


class RunError(RuntimeError):
    """The input was fine, the run was not (network, memory, non-finite latents)."""


class DiskError(OSError):
    """A file could not be written; says which."""
