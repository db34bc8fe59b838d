"""Skip-Cache: the blocks between a DiT's first and last, replaced by what they added at an earlier step.

From one step to the next the deep blocks add nearly the same. So a full step keeps what the blocks between
the first and the last added, and the steps after it put that in their place (the Skip-Cache of Skip-DiT,
arXiv 2411.17616, in its form without training). Each guidance branch keeps its own. `Branch` corrects what is
reused: the trained form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

ModelFn = Callable[..., torch.Tensor]


# --- Skip-Cache ---------------------------------------------------------------------------------------------


class Branch(torch.nn.Module):
    """A linear layer from shallow and kept deep features to what the plain reuse misses.

    Args:
        weight: [A, D, 2 D], one for each number of steps apart; the last also for those farther apart.
        bias: [A, D]
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = torch.nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor, added: torch.Tensor, *, apart: int) -> torch.Tensor:
        """x, added: [B, tokens, D]; apart: steps since `added` was kept"""
        place = min(apart, len(self.weight)) - 1
        inputs = torch.cat([x, added], -1)
        return torch.nn.functional.linear(inputs, self.weight[place], self.bias[place])


class Middle(torch.nn.Module):
    """The blocks between a DiT's first and last: run, or replaced by what they added when they last ran.

    Args:
        blocks: those between; they stay modules of the DiT, so that offloading finds them.
        every: what was kept is used for every - 1 steps.
        branch: corrects what is used again; None: it is used as it is.
    """

    def __init__(self, blocks: torch.nn.ModuleList, *, every: int, branch: Branch | None = None):
        super().__init__()
        self.blocks = blocks
        self.every = every
        self.branch = branch
        self.step, self.positive = 0, True
        self.kept: dict[bool, tuple[int, torch.Tensor]] = {}  # by guidance branch: step, what was added

    def forward(self, x: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        """What the blocks make of x, [B, tokens, dim], exactly or as they did at an earlier step."""
        step, added = self.kept.get(self.positive, (self.step - self.every, None))
        if added is not None and self.step - step < self.every:
            used = x + added
            return used if self.branch is None else used + self.branch(x, added, apart=self.step - step)
        deep = x
        for block in self.blocks:
            deep = block(deep, *inputs)
        self.kept[self.positive] = self.step, deep - x
        return deep


class SkipCacheModelFn:
    """A model_fn that tells the middles which step it is and which guidance branch."""

    def __init__(self, model_fn: ModelFn, middles: Mapping[torch.nn.Module, Middle]):
        self.model_fn = model_fn
        self.middles = middles
        self.step = -1

    def __call__(self, *, dit: torch.nn.Module, positive: bool, **kwargs: Any) -> torch.Tensor:
        self.step += positive  # the pipeline evaluates the positive branch once a step, and first
        middle = self.middles[dit]
        middle.step, middle.positive = self.step, positive
        return self.model_fn(dit=dit, positive=positive, **kwargs)
