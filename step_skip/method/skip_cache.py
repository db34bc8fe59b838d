"""Replace the blocks between a DiT's first and last by their update at an earlier step: Skip-Cache.

From one step to the next the deep blocks add nearly the same update. So a full step stores the update of the
blocks between the first and the last, and the steps after it add the stored update instead of running them
(the Skip-Cache of Skip-DiT, arXiv 2411.17616, in its form without training). Each guidance branch has its own
update. `Branch` corrects the reused update: the trained form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

ModelFn = Callable[..., torch.Tensor]


# --- Skip-Cache ---------------------------------------------------------------------------------------------


class Branch(torch.nn.Module):
    """A linear layer from shallow features and a stored update to the error of plain reuse.

    Args:
        weight: [A, D, 2 D], one matrix for each age of an update, 1 ... A steps; the last also for older.
        bias: [A, D]
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = torch.nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor, added: torch.Tensor, *, age: int) -> torch.Tensor:
        """Return the correction of a reused update, [B, tokens, D].

        Args:
            x: output of the first block, [B, tokens, D].
            added: the stored update, [B, tokens, D].
            age: number of steps since `added` was stored.
        """
        index = min(age, len(self.weight)) - 1
        inputs = torch.cat([x, added], -1)
        return torch.nn.functional.linear(inputs, self.weight[index], self.bias[index])


class Middle(torch.nn.Module):
    """The blocks between a DiT's first and last, which run or are replaced by their last update.

    Args:
        blocks: the blocks; they stay modules of the DiT, so that offloading finds them.
        every: one step in `every` runs the blocks; the update is reused for every - 1 steps.
        branch: correction of a reused update; None: it is reused as it is.
    """

    def __init__(self, blocks: torch.nn.ModuleList, *, every: int, branch: Branch | None = None):
        super().__init__()
        self.blocks = blocks
        self.every = every
        self.branch = branch
        self.step, self.positive = 0, True
        self.kept: dict[bool, tuple[int, torch.Tensor]] = {}  # by guidance branch: step, update

    def forward(self, x: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the blocks' output for x, [B, tokens, D], computed or with the update of an earlier step."""
        step, added = self.kept.get(self.positive, (self.step - self.every, None))
        if added is not None and self.step - step < self.every:
            used = x + added
            return used if self.branch is None else used + self.branch(x, added, age=self.step - step)
        deep = x
        for block in self.blocks:
            deep = block(deep, *inputs)
        self.kept[self.positive] = self.step, deep - x
        return deep


class SkipCacheModelFn:
    """A model_fn that sets the current step and guidance branch of each `Middle` before it runs."""

    def __init__(self, model_fn: ModelFn, middles: Mapping[torch.nn.Module, Middle]):
        self.model_fn = model_fn
        self.middles = middles
        self.step = -1

    def __call__(self, *, dit: torch.nn.Module, positive: bool, **kwargs: Any) -> torch.Tensor:
        self.step += positive  # the pipeline evaluates the positive branch once a step, and first
        middle = self.middles[dit]
        middle.step, middle.positive = self.step, positive
        return self.model_fn(dit=dit, positive=positive, **kwargs)
