"""Checkpoints at full size that take no disk: published names, keys, shapes and dtypes, nearly all zeros.

A file is made as long as it has to be and only a few tensors are written into it; the rest are holes, which
read as zeros. A block of zeros is the identity, by its residual, so the last block and what stands before and
after the blocks decide what comes out. DiffSynth recognises a checkpoint by a hash of its keys and shapes:
the files here have the published ones, or none is made.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

from step_skip.models.families import MODELS, TOKENIZER, Weights

Shapes = Mapping[str, list[int]]
SHARD_BYTES = 9.99e9  # of the largest shard of the published files
ITEM_BYTES = {"F32": 4, "BF16": 2}
EMBEDDED_WORDS = 8192  # rows of the text encoder's 256,384 that are written
TEXT_TOWER_DIM, TEXT_TOWER_BLOCKS = 1024, 24  # of the image encoder's file; the loader drops it


def make_model(folder: Path, model: str) -> dict[str, int]:
    """Write the files of a model of families.py below `folder` as ModelScope lays them out.

    Returns:
        Bytes: "logical", what the files claim, and "on_disk", what they take.

    Raises:
        ValueError: DiffSynth would not recognise a file.
    """
    for seed, (component, weights) in enumerate(MODELS[model].weights.items()):
        write_component(folder, component, weights, seed=seed)
    model_id, name = TOKENIZER
    write_tokenizer(folder / model_id / name)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        "logical": sum(path.stat().st_size for path in files),
        "on_disk": sum(path.stat().st_blocks * 512 for path in files),
    }


def write_component(folder: Path, component: str, weights: Weights, *, seed: int) -> None:
    """Write one component, in as many shards as it was published in."""
    shapes, dtype = published_shapes(weights), published_dtype(weights)
    number = math.ceil(weights.file_bytes / SHARD_BYTES) if "*" in weights.pattern else 1
    shards: list[dict[str, list[int]]] = [{} for _ in range(number)]
    total, before = sum(map(math.prod, shapes.values())), 0
    for name in sorted(shapes):
        shards[before * number // total][name] = shapes[name]
        before += math.prod(shapes[name])
    for i, shard in enumerate(shards, 1):
        tail = f"-{i:05d}-of-{number:05d}" if number > 1 else ""
        path = folder / weights.model_id / weights.pattern.replace("*", tail)
        live = live_names(component, shapes) & shard.keys()
        write_sparse(path, shard, dtype, live=live, seed=100 * seed + i)


def published_dtype(weights: Weights) -> str:
    """How a file's tensors are stored, by its size."""
    return "BF16" if weights.file_bytes < 3 * weights.parameters else "F32"


def published_shapes(weights: Weights) -> dict[str, list[int]]:
    """Keys and shapes of a published file, from DiffSynth's own class on the meta device.

    Raises:
        ValueError: their hash is not the one DiffSynth knows the file by.
    """
    import torch
    from diffsynth.configs import MODEL_CONFIGS
    from diffsynth.core.vram.initialization import skip_model_initialization

    config = next(each for each in MODEL_CONFIGS if each["model_hash"] == weights.model_hash)
    module, name = config["model_class"].rsplit(".", 1)
    with torch.device("meta"), skip_model_initialization():
        network = getattr(importlib.import_module(module), name)(**config.get("extra_kwargs", {}))
    shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    if config["model_name"] in ("wan_video_vae", "wan_video_image_encoder"):
        shapes = {key.removeprefix("model."): shape for key, shape in shapes.items()}
    if config["model_name"] == "wan_video_image_encoder":
        shapes |= text_tower_shapes()
    found = hash_shapes(shapes)
    if found != weights.model_hash:
        raise ValueError(f"{config['model_name']}: DiffSynth knows {weights.model_hash}, these give {found}")
    return shapes


def hash_shapes(shapes: Shapes) -> str:
    """DiffSynth's hash of a checkpoint, as hash_model_file in diffsynth/core/loader/file.py makes it."""
    words = [word for key, shape in shapes.items() for word in (f"{key}:{'_'.join(map(str, shape))}", key)]
    return hashlib.md5(",".join(sorted(words)).encode()).hexdigest()


def text_tower_shapes() -> dict[str, list[int]]:
    """The text tower of the image encoder's file, XLM-RoBERTa large."""
    dim = TEXT_TOWER_DIM
    shapes = {
        "token_embedding.weight": [250002, dim],
        "type_embedding.weight": [1, dim],
        "pos_embedding.weight": [514, dim],
        "norm.weight": [dim],
        "norm.bias": [dim],
        "head.0.weight": [dim, dim],
        "head.2.weight": [dim, dim],
    }
    layers = {f"attn.{name}": [dim, dim] for name in "qkvo"} | {
        "ffn.0": [4 * dim, dim],
        "ffn.2": [dim, 4 * dim],
    }
    for block in range(TEXT_TOWER_BLOCKS):
        for layer, shape in layers.items():
            shapes |= {f"blocks.{block}.{layer}.weight": shape, f"blocks.{block}.{layer}.bias": shape[:1]}
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{norm}.{part}": [dim] for part in ("weight", "bias")}
    return {f"textual.{key}": shape for key, shape in shapes.items()}


def live_names(component: str, shapes: Shapes) -> set[str]:
    """The tensors that are written: all but the blocks before the last, of the VAE all."""
    if component == "vae":
        return set(shapes)
    if component == "image_encoder":  # the pipeline takes what the last but one of its 32 blocks gives
        visual = {name for name in shapes if name.startswith("visual.")}
        return {name for name in visual if "transformer" not in name or ".30." in name}
    blocks = [int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")]
    last = f"blocks.{max(blocks)}."
    return {name for name in shapes if not name.startswith("blocks.") or name.startswith(last)}


def write_sparse(path: Path, shapes: Shapes, dtype: str, *, live: set[str], seed: int) -> None:
    """Write a safetensors file of these shapes in which only the live tensors take disk."""
    import torch

    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for name in sorted(shapes):
        begin, end = end, end + math.prod(shapes[name]) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": [begin, end]}
        places[name] = begin
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    kind = {"F32": torch.float32, "BF16": torch.bfloat16}[dtype]
    generator = torch.Generator().manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name in sorted(live):
            file.seek(8 + len(text) + places[name])
            values = random_values(name, shapes[name], generator).to(kind).contiguous()
            file.write(values.view(torch.uint8).numpy().tobytes())


def random_values(name: str, shape: list[int], generator: object):
    """Values at which signals keep their size: ones for norms, small biases, matrices by their fan-in."""
    import torch

    if name == "token_embedding.weight":
        return torch.randn(EMBEDDED_WORDS, shape[1], generator=generator) * 0.5
    is_norm = name.endswith(".gamma") or ("norm" in name and name.endswith("weight"))
    if is_norm:
        return torch.ones(shape)
    if len(shape) <= 1:
        return torch.randn(shape or [1], generator=generator) * 0.02
    return torch.randn(shape, generator=generator) * math.prod(shape[1:]) ** -0.5


def write_tokenizer(folder: Path) -> None:
    """A tokenizer that transformers loads offline, by letters; its ids are among the rows written."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<s>", "<unk>"]
    letters = [chr(code) for code in range(33, 127)]
    words = [(word, 0.0) for word in special] + [(letter, -1.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(words, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
