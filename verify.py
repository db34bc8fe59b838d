"""Look at everything a prior holds: what is damaged, and what it is still good for."""

from __future__ import annotations

from pathlib import Path

import command_line as cli
import prior_utils
from plan import IDENTITY_FILES
from prior_utils import InputError, Prior


def verify(directories: list[Path]) -> str:
    """Check every file of priors: SHA-256, shape, dtype, finite values; tell it file by file.

    Returns:
        The folders, one a line.

    Raises:
        InputError: something is damaged.
    """
    damaged = 0
    for prior in map(prior_utils.read_prior, directories):
        problems = find_problems(prior)
        for problem in problems.values():
            cli.say(problem)
        total = len(recorded_files(prior))
        whole = f"{total - len(problems)} of {total} files are whole"
        cli.say(f"{prior.directory}: {whole}; {usable(prior, problems)}")
        damaged += len(problems)
    if damaged:
        raise InputError(
            f"{damaged} files are damaged, see above; copy the prior again, or make good what can be made "
            "again with generate_prior.py --resume"
        )
    return "\n".join(map(str, directories))


def recorded_files(prior: Prior) -> list[str]:
    """The files a prior consists of, besides its metadata."""
    if prior.is_legacy:
        return [prior_utils.step_file(step) for step in range(prior.num_inference_steps)]
    return list(prior.metadata["files"])


def find_problems(prior: Prior) -> dict[str, str]:
    """What is wrong with a prior's files, by name."""
    problems = {}
    for name in recorded_files(prior):
        try:
            prior_utils.check_files(prior, [name])
            if name.endswith(".pt"):
                is_latents = name.startswith(("step_", "noise_pred_", prior_utils.INITIAL_LATENTS_FILE))
                load = prior_utils.load_latents if is_latents else prior_utils.load_conditioning
                load(prior, name)
        except InputError as error:
            problems[name] = str(error)
    return problems


def usable(prior: Prior, problems: dict[str, str]) -> str:
    """What a prior can be used for without its damaged files."""
    if not prior.is_legacy and problems.keys() & {*IDENTITY_FILES, *own_contexts(prior)}:
        return "it can't be resumed with its own prompts"
    steps = [
        step
        for step in range(prior.num_inference_steps if prior.is_complete else prior.whole_steps)
        if prior_utils.step_file(step) not in problems
    ]
    return f"it can be resumed after steps {ranges(steps)}" if steps else "it can't be resumed"


def own_contexts(prior: Prior) -> list[str]:
    """The files of the prior's own encoded prompts."""
    return [prior_utils.context_file(prior.metadata[key]) for key in ("prompt", "negative_prompt")]


def ranges(steps: list[int]) -> str:
    """Steps as a person would write them: 0-2, 4-9."""
    starts = [step for step in steps if step - 1 not in steps]
    ends = [step for step in steps if step + 1 not in steps]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in pairs)
