"""Choose the device of a model, and record the machine and the versions that a run's last bits depend on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from step_skip.errors import InputError
from step_skip.models.compute import attention_backend
from step_skip.models.families import MODELS

log = logging.getLogger(__name__)


# --- the machine --------------------------------------------------------------------------------------------


def pick_device(model: str, device: str | None) -> str:
    """Return the device to run on: the given one, else CUDA if available, else the CPU.

    A published model runs on the CPU only if the CPU is named.

    Raises:
        InputError: the device doesn't exist, or the model is large and the CPU wasn't named.
    """
    import torch

    found = "cuda" if torch.cuda.is_available() else "cpu"
    is_named, device = device is not None, device or found
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise InputError(f"--device {device} is not a supported device; use cpu, cuda or cuda:1")
    if model in MODELS and kind == "cpu" and not is_named:
        raise InputError(
            f"{model} needs a CUDA GPU, and the device here is the CPU; use --model tiny to run the same "
            "code on a CPU, or pass --device cpu if a clip may take hours"
        )
    if model in MODELS and kind == "cpu":
        log.warning(f"{model} runs on the CPU, as asked for: a clip of its usual size takes hours")
    if kind == "cuda" and found != "cuda":
        raise InputError(
            f"--device {device}: torch {torch.__version__} sees no CUDA GPU here; use --device cpu"
        )
    if kind == "cuda" and index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise InputError(f"--device {device}: the GPUs here are cuda:0 to cuda:{last}; use one of those")
    return device


def describe_machine(device: str) -> dict[str, Any]:
    """Return the metadata of the machine that a run's last bits depend on: device, attention, CPU threads."""
    import platform

    import torch

    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    threads, attention = torch.get_num_threads(), attention_backend()
    return {"device": device, "device_name": name, "num_threads": threads, "attention": attention}


def installed_versions() -> dict[str, Any]:
    """Return the versions of Python and of the packages that a run's numbers depend on."""
    import platform
    from importlib.metadata import version

    import torch

    packages = {name: version(name) for name in ("diffsynth", "numpy", "pillow")}
    return {"python": platform.python_version(), "torch": torch.__version__, **packages}


def differences_since(
    metadata: Mapping[str, Any], device: str, names: Iterable[str]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the differences of machine and versions since a prior was made: name, value now, value then.

    Args:
        metadata: of the prior.
        device: of the new run.
        names: entries to compare.
    """
    then, now = metadata["versions"] | metadata, installed_versions() | describe_machine(device)
    for name in names:
        is_known = name in then or name != "attention"  # older priors record no attention
        if is_known and now[name] != then.get(name):
            yield name, now[name], then.get(name)
