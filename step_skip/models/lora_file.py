"""Read LoRA files of several tools (`read_lora`, all of a file must fit a model); fuse them (`fuse_loras`).

For a layer with weight W and bias b a file may hold, with the requested strength s:

    lora_A, lora_B, alpha    W + s * (alpha / rank) * B @ A, without alpha W + s * B @ A; or lora_down, _up
    lora_B.bias              b + s * (alpha / rank) * bias
    diff, diff_b, diff_m     W + s * diff, b + s * diff_b, modulation + s * diff_m

and name the layer as in

    blocks.0.self_attn.q                     DiffSynth does, as the checkpoint
    diffusion_model.blocks.0.self_attn.q     ComfyUI (comfy/lora.py), LightX2V (extract/lora_extractor.py)
    lora_unet_blocks_0_self_attn_q           kohya's musubi-tuner (networks/lora_wan.py, convert_lora.py)
    transformer.blocks.0.attn1.to_q          diffusers (convert_wan_transformer_to_diffusers)
    base_model.model.blocks.0.self_attn.q    PEFT (get_peft_model_state_dict); also with diffusers' layers

All of a file is applied, or the file is rejected. diffusers' own converters, in contrast, drop the
differences of norms and of the time projection.

Pairs are fused in the pipeline's dtype, bit for bit as by DiffSynth's loader (diffsynth 2.1.12,
diffsynth/utils/lora/general.py), which ignores everything else; differences are added in float32 and rounded
once.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_skip.errors import InputError
from step_skip.files.bounds import MAX_HEADER_BYTES
from step_skip.files.tensors import Header, read_header

if TYPE_CHECKING:
    import torch

FLOATS = ("BF16", "F16", "F32", "F64")
ENTRIES = {  # kinds of tensors by key: the layer, then a suffix, into which PEFT may put an adapter's name
    "down": re.compile(r"(.+)\.(?:lora_A|lora_down)(?:\.[\w-]+)?\.weight"),
    "up": re.compile(r"(.+)\.(?:lora_B|lora_up)(?:\.[\w-]+)?\.weight"),
    "alpha": re.compile(r"(.+)\.alpha"),
    "up_bias": re.compile(r"(.+)\.lora_B(?:\.[\w-]+)?\.bias"),
    "diff": re.compile(r"(.+)\.diff"),
    "diff_b": re.compile(r"(.+)\.diff_b"),
    "diff_m": re.compile(r"(.+)\.diff_m"),
}
DIFFERENCES = ("up_bias", "diff", "diff_b", "diff_m")
PEFT_PREFIX, DIFFUSERS_PREFIX = "base_model.model.", "transformer."
PREFIXES = (PEFT_PREFIX, DIFFUSERS_PREFIX, "diffusion_model.")
KOHYA_PREFIX = "lora_unet_"  # in the names behind it dots are replaced by underscores
# Wan's layers by their names in diffusers 0.42 (loaders/single_file_utils.py)
DIFFUSERS_ATTENTION = {
    **{name: f"to_{name}" for name in "qkv"},
    **{name: name for name in ("norm_q", "norm_k")},
    "o": "to_out.0",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}
DIFFUSERS_IN_BLOCK = {
    **{f"self_attn.{name}": f"attn1.{theirs}" for name, theirs in DIFFUSERS_ATTENTION.items()},
    **{f"cross_attn.{name}": f"attn2.{theirs}" for name, theirs in DIFFUSERS_ATTENTION.items()},
    "norm3": "norm2",  # the norm before cross-attention
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
DIFFUSERS_OUTSIDE = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
}
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Lora:
    """A LoRA file, its strength, and the expert it applies to."""

    path: Path
    alpha: float = 1.0  # strength, s in the module's docstring
    expert: str | None = None  # "dit" or "dit2"; None: all networks of the model


# --- names --------------------------------------------------------------------------------------------------


def kind_of(key: str) -> tuple[str | None, str]:
    """Return a tensor's kind, a key of ENTRIES or None, and its layer as the file names it."""
    for kind, pattern in ENTRIES.items():
        if match := pattern.fullmatch(key):
            return kind, match[1]
    return None, key


class LayerNames:
    """All names that the tools give to the layers of a model with these parameters."""

    def __init__(self, parameters: Collection[str]):
        layers = {name.rpartition(".")[0] for name in parameters}
        layers |= {name for name in parameters if not name.endswith((".weight", ".bias"))}  # modulations
        self.dotted = {_diffusers_name(layer): layer for layer in layers} | {layer: layer for layer in layers}
        self.kohya = {name.replace(".", "_"): layer for name, layer in self.dotted.items()}

    def find(self, name: str) -> str | None:
        """Return the model's own name of a layer as a file names it, or None if it has no such layer."""
        if name.startswith(KOHYA_PREFIX):
            return self.kohya.get(name.removeprefix(KOHYA_PREFIX))
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        return self.dotted.get(name)


def _diffusers_name(layer: str) -> str:
    block = re.fullmatch(r"(blocks\.\d+\.)(.+)", layer)
    if block is None:
        return DIFFUSERS_OUTSIDE.get(layer, layer)
    return block[1] + DIFFUSERS_IN_BLOCK.get(block[2], block[2])


# --- one file, for one model --------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file of which every tensor fits a model."""

    lora: Lora
    changes: Mapping[str, Mapping[str, str]]  # by the model's parameter: keys of the file by kind
    network_alpha: float | None  # alpha of the pairs without an alpha tensor; None: their rank
    note: str | None  # a warning about the file

    @functools.cached_property
    def _opened(self) -> Any:
        from safetensors import safe_open

        return safe_open(self.lora.path, framework="pt", device="cpu")

    def check_values(self) -> None:
        """Check that all values are finite, one tensor at a time.

        Raises:
            InputError: a value is NaN or infinite.
        """
        import torch

        for key in dict.fromkeys(key for keys in self.changes.values() for key in keys.values()):
            if not torch.isfinite(self._opened.get_tensor(key)).all():
                raise _refusal(self.lora, f"has NaN or infinite values in {key!r}")

    def apply(
        self, name: str, weight: torch.Tensor, *, dtype: torch.dtype, device: str | torch.device
    ) -> torch.Tensor:
        """Return a parameter with this LoRA's change added, in dtype, on the device that adds them.

        Args:
            name: of the parameter.
            weight: of the parameter, any shape.
            dtype: of the result; pairs are multiplied in it.
        """
        keys, strength = self.changes[name], self.lora.alpha
        weight = weight.to(device=device, dtype=dtype)
        given = {kind: self._opened.get_tensor(key).to(device) for kind, key in keys.items()}
        scale = self._scale(given, dtype)
        if "up" in given:
            up, down = (given[kind].to(dtype) for kind in ("up", "down"))
            down = down if scale is None else down * scale
            pair = strength * (up.flatten(1) @ down.flatten(1))
            weight = weight + pair.reshape(weight.shape)
        for kind in DIFFERENCES:
            if kind in given:
                own = float(scale) if kind == "up_bias" and scale is not None else 1.0
                weight = (weight.float() + strength * own * given[kind].float()).to(dtype)
        return weight

    def _scale(self, given: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor | None:
        """Return alpha / rank of a pair, in dtype; None stands for 1."""
        import torch

        if "down" not in given or ("alpha" not in given and self.network_alpha is None):
            return None
        alpha = given["alpha"].reshape(()) if "alpha" in given else torch.tensor(self.network_alpha)
        return alpha.to(given["down"].device, dtype) / given["down"].shape[0]


@dataclass(frozen=True)
class FusedWeights:
    """A model's parameters by name, with LoRAs fused; replaces the DiskMap of DiffSynth's offloading."""

    weights: Any  # a mapping from names to tensors, or a DiskMap
    files: Sequence[LoraFile]
    dtype: torch.dtype
    device: str | torch.device  # device of the computation

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a parameter with all LoRAs added, on its own device; in dtype if a LoRA changes it."""
        weight = self.weights[name]
        home = weight.device
        for file in self.files:
            if name in file.changes:
                weight = file.apply(name, weight, dtype=self.dtype, device=self.device)
        return weight.to(home)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __contains__(self, name: object) -> bool:
        return name in self.weights


def fuse_loras(
    dit: torch.nn.Module, loras: Iterable[Lora], *, dtype: torch.dtype, device: str | torch.device
) -> None:
    """Fuse LoRAs into a DiT's parameters on any device; layers on the disk are fused whenever they are read.

    Args:
        dtype: of the fused parameters.
        device: of the computation.

    Raises:
        InputError: a LoRA doesn't fit as a whole.
    """
    import torch

    own = {name.replace(".module.", "."): parameter for name, parameter in dit.named_parameters()}
    files = [read_lora(lora, {name: each.shape for name, each in own.items()}) for lora in loras]
    for attributes in map(vars, dit.modules()) if files else ():
        if attributes.get("disk_offload"):
            attributes["disk_map"] = FusedWeights(attributes["disk_map"], files, dtype, device)
    weights = FusedWeights({name: each.data for name, each in own.items()}, files, dtype, device)
    with torch.no_grad():
        for name in dict.fromkeys(name for file in files for name in file.changes):
            if not own[name].is_meta:
                own[name].copy_(weights[name])


# --- checks -------------------------------------------------------------------------------------------------


def read_lora(lora: Lora, parameters: Shapes) -> LoraFile:
    """Assign each of a file's tensors to a parameter of the DiT, without reading any values.

    Args:
        parameters: shapes of the DiT's parameters by name.

    Raises:
        InputError: a tensor can't be applied; the message names it.
    """
    header, names = read_header(lora.path, what="--lora"), LayerNames(parameters)
    layers: dict[str, dict[str, str]] = {}  # by layer: keys by kind
    unmatched = []
    for key in header.shapes:
        kind, name = kind_of(key)
        layer = names.find(name)
        if kind is None or layer is None:
            unmatched.append(key)
        elif layers.setdefault(layer, {}).setdefault(kind, key) != key:
            raise _refusal(lora, f"has both {layers[layer][kind]!r} and {key!r} for one layer")
    changes: dict[str, dict[str, str]] = {}
    for layer, keys in layers.items():
        for parameter, own in _changes_of_layer(keys, layer, parameters):
            if parameter in parameters:
                changes.setdefault(parameter, {}).update(own)
            else:
                unmatched += own.values()
    if unmatched or not changes:
        example = f"{unmatched[0]!r}, for example" if unmatched else "there is nothing to apply"
        raise _refusal(
            lora, f"holds {len(header.shapes)} tensors, {len(unmatched)} of them fit nowhere: {example}"
        )
    for parameter, own in changes.items():
        _check_change(lora, parameter, own, header, parameters[parameter])
    return LoraFile(lora, changes, *_read_network_alpha(lora, header))


def _changes_of_layer(
    keys: Mapping[str, str], layer: str, parameters: Shapes
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the parameters that a layer's tensors change, each with the tensors' keys by kind."""
    own = layer if layer in parameters else f"{layer}.weight"
    bias = f"{layer}.bias"
    homes = {"diff": own, "diff_b": bias, "diff_m": f"{layer}.modulation", "up_bias": bias}
    pair = {kind: keys[kind] for kind in ("down", "up", "alpha") if kind in keys}
    if pair:
        yield f"{layer}.weight", pair
    for kind in homes.keys() & keys.keys():
        scale = ("down", "alpha") if kind == "up_bias" else ()
        yield homes[kind], {kind: keys[kind]} | {name: pair[name] for name in scale if name in pair}


def _check_change(
    lora: Lora, name: str, keys: Mapping[str, str], header: Header, shape: Sequence[int]
) -> None:
    """Check the tensors for a parameter: dtypes, pairs, shapes. up: [out, rank, ...], down: [rank, in, ...]

    Raises:
        InputError: they don't fit the parameter.
    """
    shapes = {kind: list(header.shapes[key]) for kind, key in keys.items()}
    for kind, key in keys.items():
        if kind != "alpha" and header.dtypes[key] not in FLOATS:
            raise _refusal(lora, f"has {key!r} in {header.dtypes[key]}, expected one of {', '.join(FLOATS)}")
    if math.prod(shapes.pop("alpha", [1])) != 1:
        raise _refusal(lora, f"has {header.shapes[keys['alpha']]} as {keys['alpha']!r}, expected one number")
    differences = [found for kind, found in shapes.items() if kind in DIFFERENCES]
    up, down = shapes.get("up"), shapes.get("down")
    if not shapes or (down is None) == bool(shapes.keys() & {"up", "up_bias"}):
        raise _refusal(lora, f"has {next(iter(keys.values()))!r} without the other tensor of its pair")
    fits = all(found == list(shape) for found in differences)
    if up is not None and down is not None:
        ranks = up[1:2] == down[:1] != [0]
        fits &= ranks and [*up[:1], *down[1:]] == list(shape) and math.prod(up[2:]) == 1
    if not fits:
        found = " and ".join(map(str, shapes.values()))
        raise _refusal(lora, f"has {found} for {name}, expected {list(shape)} as in this model")


def _read_network_alpha(lora: Lora, header: Header) -> tuple[float | None, str | None]:
    """Return the alpha of all pairs, which diffusers and PEFT store outside the tensors, and a warning.

    Raises:
        InputError: alpha can't be read, or the LoRA is of a kind that consists of more than pairs.
    """
    keys, beside = header.shapes, peft_config(lora.path)
    is_peft = any(key.startswith(PEFT_PREFIX) for key in keys)
    if any(kind_of(key)[0] == "alpha" for key in keys):
        return None, None
    if not is_peft and not any(key.startswith(DIFFUSERS_PREFIX) for key in keys):
        return None, None
    stored = header.metadata.get("lora_adapter_metadata")
    if stored is None and beside is None:
        note = f"{lora.path}: there is no adapter_config.json beside it, so alpha is assumed to be the rank"
        return None, note if is_peft else None
    try:
        if stored is None and beside is not None:
            with beside.open("rb") as file:
                stored = file.read(MAX_HEADER_BYTES).decode("utf-8")
        found = json.loads(str(stored))
        config = {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in found.items()}
        alpha = float(config["lora_alpha"])
        more = [name for name in ("use_dora", "use_rslora", "alpha_pattern") if config.get(name)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise _refusal(lora, f"has no lora_alpha that can be read ({type(error).__name__})") from error
    if more or not math.isfinite(alpha):
        raise _refusal(lora, f"has {more[0] if more else f'lora_alpha {alpha}'}, which isn't supported")
    return alpha, None


def peft_config(path: Path) -> Path | None:
    """Return PEFT's file of alpha beside an adapter_model.safetensors, or None if there is none."""
    config = path.with_name("adapter_config.json")
    return config if path.name == "adapter_model.safetensors" and config.is_file() else None


def _refusal(lora: Lora, what: str) -> InputError:
    return InputError(f"--lora {lora.path} {what}; none of it is applied: name a LoRA of this model")
