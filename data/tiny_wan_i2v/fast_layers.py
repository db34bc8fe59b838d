"""DiffSynth's layers as a CPU trains them fastest: the same parameters and arithmetic in fewer operations.

`speed_up(model)` turns the modules of a model that we built into subclasses of themselves; what is saved
from it loads into DiffSynth's own classes. Only training uses it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffsynth.models import wan_video_dit, wan_video_image_encoder, wan_video_vae


def speed_up(model: torch.nn.Module) -> None:
    """Make every module that has a faster subclass an instance of it."""
    for module in model.modules():
        module.__class__ = FASTER.get(type(module), type(module))


def rotate(x: torch.Tensor, freqs: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rotary embedding in float32 instead of float64. x: [B, S, N*D], freqs: complex [S, 1, D/2]"""
    batch, length, _ = x.shape
    pairs = x.float().reshape(batch, length, num_heads, -1, 2)
    cos, sin = freqs.real.float(), freqs.imag.float()
    a, b = pairs[..., 0], pairs[..., 1]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(2).to(x.dtype)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Attention as two products: its backward in bfloat16 is far faster than the fused one's. [B, S, N*D]"""
    batch, length, width = q.shape
    depth = width // num_heads
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else q.dtype
    q, k, v = (u.to(dtype).reshape(batch, -1, num_heads, depth).transpose(1, 2) for u in (q, k, v))
    with torch.autocast("cpu", enabled=False):
        weights = torch.softmax((q * depth**-0.5) @ k.transpose(-1, -2), -1)
        return (weights @ v).transpose(1, 2).reshape(batch, length, width)


class SelfAttention(wan_video_dit.SelfAttention):
    def forward(self, x, freqs):
        q = rotate(self.norm_q(self.q(x)), freqs, self.num_heads)
        k = rotate(self.norm_k(self.k(x)), freqs, self.num_heads)
        return self.o(attention(q, k, self.v(x), self.num_heads))


class CrossAttention(wan_video_dit.CrossAttention):
    def forward(self, x, y):
        image, text = y[:, :257], y[:, 257:]
        q = self.norm_q(self.q(x))
        to_text = attention(q, self.norm_k(self.k(text)), self.v(text), self.num_heads)
        to_image = attention(q, self.norm_k_img(self.k_img(image)), self.v_img(image), self.num_heads)
        return self.o(to_text + to_image)


class ImageSelfAttention(wan_video_image_encoder.SelfAttention):
    def forward(self, x):
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        return self.proj(attention(q, k, v, self.num_heads))


class CausalConv3d(wan_video_vae.CausalConv3d):
    def forward(self, x, cache_x=None):
        if x.shape[2] > 1 or cache_x is not None or self.kernel_size[0] == 1:
            return super().forward(x, cache_x)
        # the frames before are zero, so that only the last slice of the kernel counts
        out = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=self._padding[0])
        return out[:, :, None]


class RMS_norm(wan_video_vae.RMS_norm):
    def forward(self, x):
        length = x.float().square().sum(1, keepdim=True).clamp_min(1e-24).rsqrt() * self.scale
        return x * length.to(x.dtype) * self.gamma + self.bias


FASTER = {
    wan_video_dit.SelfAttention: SelfAttention,
    wan_video_dit.CrossAttention: CrossAttention,
    wan_video_image_encoder.SelfAttention: ImageSelfAttention,
    wan_video_vae.CausalConv3d: CausalConv3d,
    wan_video_vae.RMS_norm: RMS_norm,
}
