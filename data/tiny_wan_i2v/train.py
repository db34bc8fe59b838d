"""Make the embedded model from nothing: draw clips, train the VAE, encode, train the rest, write the weights.

    python data/tiny_wan_i2v/train.py all

Each stage keeps checkpoints in the build folder and continues from them; delete the folder to start over.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import world

from step_skip.models.embedded import build_tiny, load_tiny_tokenizer, set_latent_statistics
from step_skip.models.weights import read_tiny_config

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))


STAGES = ("tokenizer", "vae", "encode", "sharpen", "dit", "export")
LATENT_NOISE = 0.1  # what the decoder learns to forgive
EMPTY_SHARE, NEUTRAL_SHARE = 0.12, 0.05  # prompts without a motion, for guidance and for neutral priors
AVERAGE = 0.999


# tokenizer


def make_tokenizer(folder: Path, **_) -> None:
    """One token per word of the world's prompts and T5's closing </s>, so that no prompt is empty."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *world.vocabulary()]
    if len(words) > read_tiny_config(folder)["text_encoder"]["vocab"]:
        raise ValueError(f"config.json's vocab is too small for {len(words)} words")
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.normalizer = normalizers.Sequence([normalizers.Replace(".", " "), normalizers.Lowercase()])
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")


# VAE


def draw_pool(count: int, seed: int) -> np.ndarray:
    """Clips for the VAE, the wall's contrast varied. uint8 [count, T, H, W, 3]"""
    rng = np.random.default_rng(seed)
    pool = np.empty((count, world.FRAMES, world.SIZE, world.SIZE, 3), np.uint8)
    for i in progress(range(count), "draw"):
        identity = world.sample_identity(rng, contrast=rng.uniform(0.15, 0.35))
        pool[i] = world.render(identity, world.MOTIONS[i % len(world.MOTIONS)], world.sample_open_part(rng))
    return pool


def crops(pool: np.ndarray, rng: np.random.Generator, *, batch: int, frames: int, size: int):
    """Random cuts of clips, mirrored, colours exchanged and inverted. float [B, 3, T, h, w]"""
    import torch

    cuts = np.empty((batch, 3, frames, size, size), np.float32)
    for cut in cuts:
        clip = pool[rng.integers(len(pool))]
        t, y, x = rng.integers(world.FRAMES - frames + 1), *rng.integers(world.SIZE - size + 1, size=2)
        piece = clip[t : t + frames, y : y + size, x : x + size][..., rng.permutation(3)]
        piece = piece[:, :, :: rng.choice((-1, 1))].transpose(3, 0, 1, 2)
        cut[:] = (piece / 127.5 - 1) * rng.choice((-1, 1))
        if frames > 1 and rng.random() < 0.2:
            cut[:, 1:] = 0  # Wan's image condition: the first frame, then grey
    return torch.from_numpy(cuts)


def build_vae(folder: Path, seed: int):
    """The VAE at the config's sizes, untrained."""
    from fast_layers import speed_up

    vae = build_tiny(read_tiny_config(folder), seed=seed, only=("vae",))["vae"]
    speed_up(vae)
    return vae


def initialise_vae(model) -> None:
    """Every causal convolution begins as an orthogonal one of the current frame alone, residuals small."""
    import torch
    from diffsynth.models.wan_video_vae import CausalConv3d, Resample, ResidualBlock

    for module in model.modules():
        if isinstance(module, CausalConv3d):
            torch.nn.init.zeros_(module.weight)
            module.weight.data[:, :, -1] = torch.nn.init.orthogonal_(
                module.weight.data[:, :, -1].contiguous()
            )
            torch.nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            module.residual[-1].weight.data *= 0.1
        if isinstance(module, Resample) and hasattr(module, "time_conv"):
            weight = module.time_conv.weight.data  # [out, in, 3, 1, 1]; out is twice in where frames double
            copies = weight.shape[0] // weight.shape[1]
            weight[:, :, -1, 0, 0] = torch.eye(weight.shape[1]).repeat(copies, 1)


def train_vae(
    folder: Path, build: Path, *, seed: int, image_steps: int, video_steps: int, polish_steps: int, **_
):
    """Single frames, then nine-frame cuts in two rounds; L1 + squared error through noisy latents."""
    import torch

    vae = build_vae(folder, seed)
    model = vae.model.train().requires_grad_(True)
    initialise_vae(model)
    pool = draw_pool(500, seed)
    rounds = ((image_steps, 3e-3), (video_steps, 1.5e-3), (polish_steps, 1.5e-3))

    def cut(step: int, rng: np.random.Generator):
        if step < image_steps:
            return crops(pool, rng, batch=32, frames=1, size=32)
        wide = step % 4 == 0
        return crops(pool, rng, batch=2 if wide else 8, frames=9, size=64 if wide else 32)

    def loss(step: int, rng: np.random.Generator):
        video = cut(step, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=step >= image_steps):
            latents = model.encode(video, vae.scale)
            noisy = latents + LATENT_NOISE * torch.randn(latents.shape)
            error = model.decode(noisy, vae.scale).float() - video
        return reconstruction_loss(error) + 1e-4 * latents.float().square().mean()

    run("vae", build, {"vae": model}, loss, rounds, seed=seed, average=None)


def reconstruction_loss(error):
    """L1 + squared error, edges counted once more. error: [B, 3, T, H, W]"""
    edges = error.diff(dim=3).abs().mean() + error.diff(dim=4).abs().mean()
    return error.abs().mean() + error.square().mean() + edges


# latents


def training_clips(seed: int, motions: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """First frame, motions and clips of one identity after the other, always the same ones for a seed."""
    rng = np.random.default_rng(seed + 1)
    while True:
        identity = world.sample_identity(rng)
        chosen = rng.choice(len(world.MOTIONS), size=motions, replace=False)
        clips = [world.render(identity, world.MOTIONS[m], world.sample_open_part(rng)) for m in chosen]
        yield world.first_frame(identity), chosen, np.stack(clips)


def to_video(frames: np.ndarray):
    """uint8 [N, T, H, W, 3] -> float [N, 3, T, H, W] in -1..1"""
    import torch

    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3) / 127.5 - 1


def encode_clips(folder: Path, build: Path, *, seed: int, identities: int, motions: int, **_) -> None:
    """Latents of every clip and of every image condition, normalised per channel, with what was drawn."""
    import torch

    if (build / "latents.pt").exists():
        return
    vae = build_vae(folder, seed)
    vae.model.load_state_dict(torch.load(build / "vae.pt")["modules"]["vae"])
    clips, conditions, images, said = [], [], [], []
    drawn = training_clips(seed, motions)
    for _ in progress(range(identities), "encode"):
        image, chosen, videos = next(drawn)
        batch = to_video(videos)  # [M, 3, T, H, W]
        still = torch.zeros_like(batch[:1])
        still[:, :, 0] = batch[0, :, 0]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents = vae.model.encode(torch.cat([batch, still]), vae.scale)
        clips.append(latents[:-1].half())
        conditions.append(latents[-1:].half())
        images.append(torch.from_numpy(image).permute(2, 0, 1))
        said.append(torch.from_numpy(chosen))
    clips, conditions = torch.stack(clips), torch.cat(conditions)  # [N, M, 16, t, h, w], [N, 16, t, h, w]
    mean, std = clips.float().mean((0, 1, 3, 4, 5)), clips.float().std((0, 1, 3, 4, 5))
    shape = (-1, 1, 1, 1)
    save(
        {
            "clips": ((clips - mean.view(shape)) / std.view(shape)).half(),
            "conditions": ((conditions - mean.view(shape)) / std.view(shape)).half(),
            "images": torch.stack(images),
            "motions": torch.stack(said),
            "mean": mean,
            "std": std,
        },
        build / "latents.pt",
    )


def sharpen_decoder(folder: Path, build: Path, *, seed: int, motions: int, sharpen_steps: int, **_) -> None:
    """The decoder alone, on whole clips and the latents it will be given."""
    import torch

    data = torch.load(build / "latents.pt")
    vae = build_vae(folder, seed)
    vae.model.load_state_dict(torch.load(build / "vae.pt")["modules"]["vae"])
    set_latent_statistics(vae, data["mean"], data["std"])
    modules = {name: getattr(vae.model, name).train().requires_grad_(True) for name in ("conv2", "decoder")}
    drawn = training_clips(seed, motions)
    videos = np.stack([next(drawn)[2] for _ in progress(range(200), "draw")])  # [200, M, T, H, W, 3]

    def loss(step: int, rng: np.random.Generator):
        who, which = rng.integers(len(videos)), rng.integers(motions)
        video = to_video(videos[who, which][None])
        latents = data["clips"][who, which][None].float()
        noise = LATENT_NOISE * torch.randn(latents.shape) / data["std"].view(1, -1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            error = vae.model.decode(latents + noise, vae.scale).float() - video
        return reconstruction_loss(error)

    run("sharpen", build, modules, loss, ((sharpen_steps, 1e-3),), seed=seed)


# DiT, text encoder, image encoder


def train_dit(folder: Path, build: Path, *, seed: int, dit_steps: int, batch: int, **_) -> None:
    """Flow matching on the latents; prompts, and with them the encoders, learned together with the DiT."""
    import torch
    from diffsynth.pipelines.wan_video import model_fn_wan_video
    from fast_layers import speed_up

    data = torch.load(build / "latents.pt")
    modules = build_tiny(read_tiny_config(folder), seed=seed, only=("dit", "text_encoder", "image_encoder"))
    for module in modules.values():
        module.train().requires_grad_(True)
        speed_up(module)
    initialise_dit(modules["dit"])
    for block in modules["dit"].blocks:
        block.compile(dynamic=False)
    images = clip_inputs(data["images"], modules["image_encoder"])
    prompts = Prompts(load_tiny_tokenizer(folder))

    def loss(step: int, rng: np.random.Generator):
        who = rng.integers(len(data["images"]), size=batch)
        which = rng.integers(data["motions"].shape[1], size=batch)
        ids, mask = prompts.sample(rng, data["motions"][who, which].tolist())
        sigma = sample_sigma(rng, batch).view(-1, 1, 1, 1, 1)
        clean = data["clips"][who, which].float()  # [B, 16, t, h, w]
        noise = torch.randn(clean.shape)
        with torch.autocast("cpu", torch.bfloat16):
            context = modules["text_encoder"](ids, mask) * mask[..., None]
            noise_pred = model_fn_wan_video(
                modules["dit"],
                latents=(1 - sigma) * clean + sigma * noise,
                timestep=1000 * sigma.flatten(),
                context=context,
                clip_feature=modules["image_encoder"].model.visual(images[who].float(), use_31_block=True),
                y=image_condition(data["conditions"][who].float()),
            )
        return (noise_pred.float() - (noise - clean)).square().mean()

    run("dit", build, modules, loss, ((dit_steps, 2e-3),), seed=seed, warmup=200, muon=True)


def initialise_dit(dit) -> None:
    """Xavier for the linear layers, a head that says nothing at first (DiT, 2212.09748)."""
    import torch

    for module in dit.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
    torch.nn.init.zeros_(dit.head.head.weight)


def clip_inputs(images, image_encoder):
    """What WanImageEncoder.encode_image feeds its CLIP. images: uint8 [N, 3, H, W] -> half [N, 3, S, S]"""
    import torch.nn.functional as F

    size = (image_encoder.model.image_size,) * 2
    resized = F.interpolate(images / 127.5 - 1, size=size, mode="bicubic", align_corners=False)
    return image_encoder.transforms.transforms[-1](resized * 0.5 + 0.5).half()


def image_condition(latents):
    """Wan's y: a mask of the given frame's four sub-frames, then the latents. -> [B, 20, t, h, w]"""
    import torch

    mask = torch.zeros_like(latents[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], 1)


class Prompts:
    """Every trained prompt, tokenized once."""

    def __init__(self, tokenizer):
        said = [
            [f"{who} {wording}" for who in world.SUBJECTS for wording in world.WORDINGS[motion][0]]
            for motion in world.MOTIONS
        ]
        self.motions = [tokenizer(group, return_mask=True) for group in said]
        self.neutral = tokenizer(list(world.NEUTRAL), return_mask=True)
        self.empty = tokenizer("", return_mask=True)

    def sample(self, rng: np.random.Generator, motions: list[int]):
        """One prompt per clip, some without the motion. -> ids, mask: [B, L]"""
        import torch

        chosen = []
        for motion in motions:
            draw = rng.random()
            if draw < EMPTY_SHARE:
                group = self.empty
            elif draw < EMPTY_SHARE + NEUTRAL_SHARE:
                group = self.neutral
            else:
                group = self.motions[motion]
            row = rng.integers(len(group[0]))
            chosen.append((group[0][row], group[1][row]))
        return torch.stack([ids for ids, _ in chosen]), torch.stack([mask for _, mask in chosen])


def sample_sigma(rng: np.random.Generator, batch: int):
    """Half the sigmas as the schedule spends its steps (shift 5), half where the detail is decided."""
    import torch

    even = (rng.permutation(batch) + rng.random(batch)) / batch
    shift = np.where(rng.random(batch) < 0.45, 5.0, 1.3)
    return torch.from_numpy(shift * even / (1 + (shift - 1) * even)).float()


# the loop that both trainings share


def run(
    name: str,
    build: Path,
    modules: dict,
    loss: Callable,
    rounds: tuple[tuple[int, float], ...],
    *,
    seed: int,
    warmup: int = 50,
    average: float | None = AVERAGE,
    muon: bool = False,
) -> None:
    """AdamW or Muon, clipped gradients, averaged weights; continues from `build/name.pt`.

    rounds: (steps, highest learning rate) of each.
    """
    import torch

    steps = sum(length for length, _ in rounds)
    path = build / f"{name}.pt"
    params = [p for module in modules.values() for p in module.parameters()]
    optimizers = make_optimizers(modules, muon=muon)
    mean, first, spent = [p.detach().clone() for p in params], 0, 0.0
    if path.exists():
        saved = torch.load(path)
        first, spent, mean = saved["step"], saved["seconds"], saved["mean"]
        for param, value in zip(params, saved["params"], strict=True):
            param.data.copy_(value)
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    began, shown = time.time(), 0.0
    for step in (bar := progress(range(first, steps), name)):
        torch.manual_seed(seed * 1_000_003 + step)
        value = loss(step, np.random.default_rng([seed, step]))
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, rounds, warmup=warmup)
            optimizer.step()
            optimizer.zero_grad()
        decay = 0.0 if average is None else min(average, (step + 1) / (step + 10))
        torch._foreach_lerp_(mean, [p.detach() for p in params], 1 - decay)
        shown = value.item() if step == first else 0.98 * shown + 0.02 * value.item()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{shown:.4f}")
        if (step + 1) % 200 == 0 or step + 1 == steps:
            seconds = spent + time.time() - began
            with (build / f"{name}_log.csv").open("a") as log:
                log.write(f"{step + 1},{seconds:.0f},{shown:.5f}\n")
            checkpoint(path, modules, params, mean, optimizers, step + 1, seconds)


def make_optimizers(modules: dict, *, muon: bool) -> list:
    """AdamW; with `muon` the matrices inside the blocks get Muon's orthogonal steps, of AdamW's size."""
    import torch

    named = [(name, p) for module in modules.values() for name, p in module.named_parameters()]
    inner = [p for name, p in named if muon and "blocks." in name and p.ndim == 2]
    kept = {id(p) for p in inner}
    rest = [p for _, p in named if id(p) not in kept]
    optimizers = [torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.01)]
    if inner:
        optimizers.append(torch.optim.Muon(inner, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def checkpoint(
    path: Path, modules: dict, params: list, mean: list, optimizers: list, step: int, seconds: float
) -> None:
    """Everything needed to go on, and the averaged modules as they would be exported."""
    current = [p.detach().clone() for p in params]
    for param, value in zip(params, mean, strict=True):
        param.data.copy_(value)
    averaged = {
        name: {k: v.detach().clone() for k, v in module.state_dict().items()}
        for name, module in modules.items()
    }
    for param, value in zip(params, current, strict=True):
        param.data.copy_(value)
    state = {"params": current, "mean": mean, "modules": averaged, "step": step, "seconds": seconds}
    save(state | {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}, path)


def save(value: dict, path: Path) -> None:
    """torch.save under a temporary name, then rename."""
    import torch

    torch.save(value, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def learning_rate(step: int, rounds: tuple[tuple[int, float], ...], *, warmup: int) -> float:
    """In every round a linear warm-up, then half a cosine down to 2% of its peak."""
    for length, peak in rounds:
        if step < length:
            half = (1 + math.cos(math.pi * step / length)) / 2
            return peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * half)
        step -= length
    raise ValueError("step beyond the last round")


def progress(items: range, name: str):
    """A progress bar on stderr."""
    from tqdm import tqdm

    return tqdm(items, desc=name, file=sys.stderr, mininterval=2.0)


# the files


def export(folder: Path, build: Path, **_) -> None:
    """The trained modules as bfloat16 safetensors, the VAE's with the statistics of its latents."""
    import torch
    from safetensors.torch import save_file

    modules = torch.load(build / "dit.pt")["modules"]
    latents = torch.load(build / "latents.pt")
    vae = torch.load(build / "vae.pt")["modules"]["vae"]
    for name, weights in torch.load(build / "sharpen.pt")["modules"].items():
        vae |= {f"{name}.{key}": value for key, value in weights.items()}
    vae = {f"model.{key}": value for key, value in vae.items()}
    for name, weights in (modules | {"vae": vae}).items():
        tensors = {key: value.to(torch.bfloat16).contiguous() for key, value in weights.items()}
        if name == "vae":
            tensors |= {"mean": latents["mean"], "std": latents["std"]}
        path = folder / f"{name}.safetensors"
        save_file(tensors, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").chmod(0o644)
        path.with_suffix(".tmp").rename(path)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("stage", choices=(*STAGES, "all"), help="what to do; `all` does every stage in order")
    parser.add_argument("--folder", type=Path, default=HERE, help="holds config.json, receives the weights")
    parser.add_argument("--build", type=Path, default=HERE / ".build", help="checkpoints and latents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--image_steps", type=int, default=1800, help="VAE steps on single frames")
    parser.add_argument("--video_steps", type=int, default=1000, help="VAE steps on nine-frame cuts")
    parser.add_argument("--polish_steps", type=int, default=1600, help="VAE steps of a second round on those")
    parser.add_argument("--identities", type=int, default=1400, help="identities to encode")
    parser.add_argument("--motions", type=int, default=3, help="clips of each identity")
    parser.add_argument("--sharpen_steps", type=int, default=600, help="steps of the VAE's decoder alone")
    parser.add_argument("--dit_steps", type=int, default=7000, help="steps of the DiT's training")
    parser.add_argument("--batch", type=int, default=20, help="clips in a step of the DiT's training")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    import torch

    torch.set_num_threads(args.threads)
    args.build.mkdir(parents=True, exist_ok=True)
    todo = {
        "tokenizer": make_tokenizer,
        "vae": train_vae,
        "encode": encode_clips,
        "sharpen": sharpen_decoder,
        "dit": train_dit,
        "export": export,
    }
    seconds = {}
    for stage in STAGES if args.stage == "all" else (args.stage,):
        began = time.time()
        todo[stage](**vars(args))
        seconds[stage] = round(time.time() - began)
        print(f"{stage}: {seconds[stage]} s", file=sys.stderr)
    with (args.build / "seconds.jsonl").open("a") as log:
        log.write(json.dumps(seconds) + "\n")
    print(args.folder)


if __name__ == "__main__":
    main()
