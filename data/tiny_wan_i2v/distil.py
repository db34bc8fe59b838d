"""Make the finished model cheaper to run: a LoRA for 4 steps without guidance, and a branch for Skip-Cache.

    python data/tiny_wan_i2v/distil.py lora       # distilled_lora.safetensors
    python data/tiny_wan_i2v/distil.py branch     # skip_branch.safetensors

Both learn from runs of the model itself on identities drawn for it; its own weights stay as they are.

lora: where the model's guided run of 12 steps goes in three of them, the LoRA goes in one. It is given the
run's latents and learns the velocity that leads straight to where the run is three steps later (progressive
distillation, arXiv 2202.00512, in one round; guidance with it, arXiv 2210.03142).

branch: Skip-DiT (arXiv 2411.17616) joins the first block's output to the kept deep features by a trained
linear layer. Here everything else is frozen, so the layer has a closed form: the least squares for what the
plain reuse gets wrong, one layer for each number of steps apart, 1 to 3 (skip_cache.Branch).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import world
from fast_layers import speed_up
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from step_skip.models.loading import load_pipeline
from step_skip.models.weights import LoadOptions, model_defaults, weight_files
from step_skip.pipeline.run import encode_image, encode_prompt
from step_skip.pipeline.schedulers import compute_schedule

FIRST_IDENTITY = 3_000_000  # a stream of identities of its own
LORA_FILE, BRANCH_FILE = "distilled_lora.safetensors", "skip_branch.safetensors"
LORA_STEPS, PARTS = 4, 3  # the LoRA's steps, and the model's for each
MAX_APART = 3  # steps; what --skip_cache 4 reuses


@dataclass(frozen=True)
class Clips:
    """Some clips of one identity: what the network sees besides latents and timestep. [N, ...]"""

    y: Tensor
    clip_feature: Tensor
    context_posi: Tensor
    context_nega: Tensor
    noise: Tensor  # [N, 16, t, h, w]


def draw(pipe: Any, defaults: Any, *, identities: int, clips: int, seed: int) -> Iterator[Clips]:
    """The clips of one identity after the other, always the same ones for a seed."""
    from PIL import Image
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(seed)
    nega = encode_prompt(pipe, defaults.negative_prompt)
    for index in tqdm(range(identities), "runs", mininterval=2.0):
        rng = np.random.default_rng([FIRST_IDENTITY, seed, index])
        frame = world.first_frame(world.sample_identity(rng))
        condition = encode_image(pipe, Image.fromarray(frame), num_frames=defaults.num_frames)
        motions = rng.choice(world.MOTIONS, clips, replace=False)
        posi = [encode_prompt(pipe, world.sample_prompt(rng, str(motion))) for motion in motions]
        shape = (clips, 16, *condition["y"].shape[2:])
        yield Clips(
            y=condition["y"].expand(clips, -1, -1, -1, -1),
            clip_feature=condition["clip_feature"].expand(clips, -1, -1),
            context_posi=torch.cat(posi),
            context_nega=nega.expand(clips, -1, -1),
            noise=torch.randn(shape, generator=generator),
        )


def predict(pipe: Any, latents: Tensor, sigmas: Tensor, clips: Clips, *, context: Tensor) -> Tensor:
    """The network's velocity. latents: [N, 16, t, h, w], sigmas: [N]"""
    return pipe.model_fn(
        pipe.dit,
        latents=latents,
        timestep=1000 * sigmas,
        context=context,
        clip_feature=clips.clip_feature,
        y=clips.y,
    )


@torch.no_grad()
def guided_run(pipe: Any, clips: Clips, sigmas: list[float], cfg_scale: float) -> Iterator[Tensor]:
    """The latents before every step of a guided run, then the clean ones."""
    latents = clips.noise
    for sigma, after in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        yield latents
        now = torch.full((len(latents),), sigma)
        posi = predict(pipe, latents, now, clips, context=clips.context_posi)
        nega = predict(pipe, latents, now, clips, context=clips.context_nega)
        latents = latents + (after - sigma) * (nega + cfg_scale * (posi - nega))
    yield latents


# --- the LoRA -----------------------------------------------------------------------------------------------


def add_adapters(dit: torch.nn.Module, rank: int) -> dict[str, Tensor]:
    """Give every linear layer of the blocks a low-rank addition; the names are DiffSynth's for a LoRA's."""
    weights = {}
    for name, layer in dit.named_modules():
        if not (name.startswith("blocks.") and isinstance(layer, torch.nn.Linear)):
            continue
        down = torch.randn(rank, layer.in_features) / math.sqrt(layer.in_features)
        up = torch.zeros(layer.out_features, rank)
        weights |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        layer.register_forward_hook(
            lambda _, inputs, output, down=down, up=up: output + inputs[0] @ down.T @ up.T
        )
    for weight in weights.values():
        weight.requires_grad_(True)
    return weights


def train_lora(pipe: Any, defaults: Any, args: argparse.Namespace) -> dict[str, Tensor]:
    """The LoRA's tensors after `args.steps` steps of AdamW on clips of the model's own runs."""
    from tqdm import tqdm

    schedule = {"denoising_strength": 1.0, "sigma_shift": defaults.sigma_shift}
    sigmas = compute_schedule(num_inference_steps=LORA_STEPS * PARTS, **schedule)[1]
    runs = []
    for clips in draw(pipe, defaults, identities=args.identities, clips=args.clips, seed=args.seed):
        points = list(guided_run(pipe, clips, sigmas, defaults.cfg_scale))[::PARTS]
        runs.append((clips, torch.stack(points)))  # [5, N, 16, t, h, w]
    ends = torch.tensor([*sigmas[::PARTS], 0.0])
    torch.manual_seed(args.seed)
    weights = add_adapters(pipe.dit, args.rank)
    optimizer = torch.optim.AdamW(weights.values(), lr=args.lr, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    shown, rng = None, np.random.default_rng(args.seed)
    for _ in (bar := tqdm(range(args.steps), "lora", mininterval=2.0)):
        clips, points = runs[rng.integers(len(runs))]
        step = torch.from_numpy(rng.integers(LORA_STEPS, size=args.clips))
        each = torch.arange(args.clips)
        begin, end, now = points[step, each], points[step + 1, each], ends[step]
        straight = (begin - end) / (now - ends[step + 1]).view(-1, 1, 1, 1, 1)
        loss = (predict(pipe, begin, now, clips, context=clips.context_posi) - straight).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        shown = loss.item() if shown is None else 0.98 * shown + 0.02 * loss.item()
        bar.set_postfix(loss=f"{shown:.4f}")
    return {name: weight.detach().bfloat16().contiguous() for name, weight in weights.items()}


# --- the branch ---------------------------------------------------------------------------------------------


class Features:
    """What enters the second block and what enters the last, at every forward."""

    def __init__(self, blocks: torch.nn.ModuleList):
        self.shallow: list[Tensor] = []
        self.deep: list[Tensor] = []
        for block, found in ((blocks[1], self.shallow), (blocks[-1], self.deep)):
            block.register_forward_pre_hook(lambda _, inputs, found=found: found.append(inputs[0]))

    def take(self) -> tuple[Tensor, Tensor]:
        """Shallow features and what the middle added since the last call, [steps, 2 branches, N, L, D]."""
        shallow, deep = (torch.stack(found).unflatten(0, (-1, 2)) for found in (self.shallow, self.deep))
        self.shallow.clear()
        self.deep.clear()
        return shallow, deep - shallow


def fit_branch(pipe: Any, defaults: Any, args: argparse.Namespace) -> dict[str, Tensor]:
    """A Branch's weight and bias, and on stderr what they leave of the plain reuse's error."""
    schedule = {"denoising_strength": 1.0, "sigma_shift": defaults.sigma_shift}
    sigmas = compute_schedule(num_inference_steps=10, **schedule)[1]
    features, held_out = Features(pipe.dit.blocks), []
    sums = [LeastSquares() for _ in range(MAX_APART)]
    drawn = draw(pipe, defaults, identities=args.identities, clips=args.clips, seed=args.seed)
    for index, clips in enumerate(drawn):
        list(guided_run(pipe, clips, sigmas, defaults.cfg_scale))
        found = features.take()
        if index % 5 == 4:
            held_out.append(found)
            continue
        for apart, each in enumerate(sums, 1):
            each.add(*reuse(*found, apart))
    solutions = [each.solve() for each in sums]  # [2 D + 1, D] each
    for apart, solution in enumerate(solutions, 1):
        say_what_is_left(apart, solution, [reuse(*found, apart) for found in held_out])
    both = torch.stack(solutions).float()
    return {"weight": both[:, :-1].mT.contiguous(), "bias": both[:, -1].contiguous()}


class LeastSquares:
    """Sums over rows as they come, solved at the end."""

    def __init__(self):
        self.squares: Tensor | float = 0.0
        self.products: Tensor | float = 0.0

    def add(self, inputs: Tensor, wanted: Tensor) -> None:
        """inputs: [rows, D], wanted: [rows, outputs]"""
        self.squares = self.squares + inputs.T @ inputs
        self.products = self.products + inputs.T @ wanted

    def solve(self) -> Tensor:
        """The matrix [D, outputs] that makes the wanted of the inputs; a little ridge for those at rest."""
        ridge = 1e-6 * self.squares.diagonal().mean() * torch.eye(len(self.squares), dtype=torch.float64)
        return torch.linalg.solve(self.squares + ridge, self.products)


def reuse(shallow: Tensor, added: Tensor, apart: int) -> tuple[Tensor, Tensor]:
    """What the layer sees and what the plain reuse misses, token by token: [rows, 2 D + 1], [rows, D]"""
    now, kept, right = shallow[apart:], added[:-apart], added[apart:]
    inputs = torch.cat([now, kept, torch.ones_like(now[..., :1])], -1)
    return inputs.flatten(0, -2).double(), (right - kept).flatten(0, -2).double()


def say_what_is_left(apart: int, solution: Tensor, held_out: list[tuple[Tensor, Tensor]]) -> None:
    """Root mean square of the error over that of what is reused, on identities that were not fitted."""
    inputs, missing = (torch.cat(parts) for parts in zip(*held_out, strict=True))
    kept = inputs[:, solution.shape[1] : 2 * solution.shape[1]]
    plain, better = (left.norm() / kept.norm() for left in (missing, missing - inputs @ solution))
    print(f"{apart} apart: {plain:.3f} wrong, {better:.3f} with the branch", file=sys.stderr)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("what", choices=("lora", "branch"))
    parser.add_argument("--folder", type=Path, default=HERE, help="holds the model, receives the file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--identities", type=int, help="identities to run the model on (default: 200; 20)")
    parser.add_argument("--clips", type=int, default=4, help="clips of each, and in a step of the training")
    parser.add_argument("--steps", type=int, default=2400, help="steps of the LoRA's training")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate of the LoRA's training")
    args = parser.parse_args(argv)
    args.identities = args.identities or {"lora": 200, "branch": 20}[args.what]
    return args


def main(argv: list[str] | None = None) -> None:
    """Make one of the two files and print its path."""
    from safetensors.torch import save_file

    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    options = LoadOptions("tiny", "cpu", "float32", model_dir=args.folder)
    pipe = load_pipeline(options, weight_files(options))
    defaults = model_defaults("tiny", args.folder)
    speed_up(pipe.dit)
    made, name = {"lora": (train_lora, LORA_FILE), "branch": (fit_branch, BRANCH_FILE)}[args.what]
    path = args.folder / name
    save_file(made(pipe, defaults, args), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").chmod(0o644)  # safetensors writes for the owner alone
    path.with_suffix(".tmp").rename(path)
    print(path)


if __name__ == "__main__":
    main()
