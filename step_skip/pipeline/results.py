"""Collect the results of a run and their cost: `RunResult` and `Clock`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from step_skip.method.closeness import FirstLook
    from step_skip.pipeline.schedulers import Step


@dataclass
class RunResult:
    """The frames and latents of a run, and its cost."""

    frames: list[Image.Image]  # empty if the run was stopped early
    latents: torch.Tensor  # after the last step, [B, C, T, H, W]
    steps: list[int]  # indices of the steps that ran
    forwards: int  # network evaluations
    block_evaluations: int = 0  # evaluations of transformer blocks; a full forward evaluates all blocks
    seconds: dict[str, float] = field(default_factory=dict)  # by phase: encode, denoise, ...
    seconds_per_step: list[float] = field(default_factory=list)
    first_look: FirstLook | None = None  # of a differential resume
    path: list[Step] = field(default_factory=list)  # steps of a differential resume, on the CPU

    def then(self, later: RunResult) -> RunResult:
        """Return the result of this run and a later run that continued it, as one."""
        return RunResult(
            later.frames,
            later.latents if later.steps else self.latents,
            self.steps + later.steps,
            self.forwards + later.forwards,
            self.block_evaluations + later.block_evaluations,
            {phase: s + later.seconds.get(phase, 0.0) for phase, s in self.seconds.items()},
            self.seconds_per_step + later.seconds_per_step,
            self.first_look or later.first_look,
            self.path + later.path,
        )


class Clock:
    """A clock that adds up the seconds of a run by phase."""

    def __init__(self):
        self.seconds = dict.fromkeys(("load", "encode", "denoise", "decode", "save"), 0.0)
        self.mark = time.perf_counter()

    def add(self, phase: str) -> float:
        """Count the time since the last call as `phase`, and return it."""
        now = time.perf_counter()
        elapsed, self.mark = now - self.mark, now
        self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed
        return elapsed

    def include(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds that another clock has counted since the last call."""
        for phase, elapsed in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed
        self.mark = time.perf_counter()
