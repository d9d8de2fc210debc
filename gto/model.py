"""The target: a Llama-style decoder with a static KV cache. One forward serves training and prefill (causal, nothing
cached), one-token decoding and tree verification (a cached prefix, positions and an ancestor mask)."""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from kernels.fused import add_rms_norm, rotate
from kernels.tree_attention import tree_attention


@dataclass
class ModelConfig:
    vocab_size: int = 2048
    layers: int = 8
    dim: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    ffn_dim: int = 384
    max_len: int = 2048                # longest context the model is meant for, in tokens
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: tuple | None = None  # Llama 3.1: (factor, low_freq_factor, high_freq_factor, original_max_len)
    tied: bool = True                  # the output matrix is the embedding
    qk_norm: bool = False              # Qwen3: RMSNorm of every query and key head before the rotation

    @property
    def taps(self) -> tuple:
        """The layers whose inputs are the draft head's features: EAGLE-3's low, middle and high layer."""
        n = self.layers
        return (2, n // 2, n - 3) if n >= 7 else ((n - 1) // 3, 2 * (n - 1) // 3, n - 1)


def rotary_frequencies(config):
    """Angular frequencies [head_dim / 2], in radians per position, float32; with Llama 3.1's scaling if configured."""
    freq = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    if config.rope_scaling is None:
        return freq
    factor, low, high, original = config.rope_scaling
    wavelength = 2 * math.pi / freq
    blend = ((original / wavelength - low) / (high - low)).clamp(0, 1)   # 0: long waves, slowed down; 1: kept
    return freq * ((1 - blend) / factor + blend)


def rotation(positions, frequencies):
    """positions [B, N] -> cos, sin [B, N, D/2], float32 at any length: there is no table to outgrow."""
    angles = positions[..., None] * frequencies
    return angles.cos(), angles.sin()


class KV(NamedTuple):
    """Keys and values by layer, [sequences, kv_heads, positions, head_dim] each: what a forward over a text returns."""
    k: list
    v: list


class Prefix(NamedTuple):
    """What new tokens may see besides each other: positions 0 .. length-1 of a cache."""
    cache: "KVCache | KV"
    length: torch.Tensor                   # [B]
    sequence: torch.Tensor | None = None   # [B], the cache row of each tree; None: row b


class KVCache:
    """Keys and values, [layers, sequences, kv_heads, capacity, head_dim] each; the caller knows each row's length."""

    def __init__(self, model, sequences, capacity):
        shape = (model.config.layers, sequences, model.config.kv_heads, capacity, model.config.head_dim)
        self.k, self.v = model.norm.weight.new_zeros(2, *shape)

    def commit(self, keys, values, length, path=None):
        """Append keys, values, per layer [B, kv_heads, N, D], behind the first `length` [B] positions of every row: all
        N, or those at `path` [B, P]. P is fixed: what is behind the caller's new length is overwritten later."""
        for cache, new in (self.k, keys), (self.v, values):
            new = torch.stack(new)                                                    # [L, B, G, N, D]
            if path is not None:
                new = new.gather(3, path[None, :, None, :, None].expand(*new.shape[:3], -1, new.shape[4]))
            slots = length[:, None] + torch.arange(new.shape[3], device=length.device)  # [B, P]
            cache[:, :len(length)].scatter_(3, slots[None, :, None, :, None].expand_as(new), new)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x, delta=None):
        """Returns (x + delta, norm(x + delta)): the residual addition is part of the same kernel."""
        return add_rms_norm(x, delta, self.weight, self.eps)


class Linear(nn.Linear):
    """Without a bias. A large frozen weight is kept on a CPU in oneDNN's own order, too: 4 to 24 rows read it up to 1.7
    times as fast (measured), so that verifying a few drafts costs little more than a plain step."""

    def __init__(self, in_dim, out_dim):
        super().__init__(in_dim, out_dim, bias=False)
        self.packed = None

    def forward(self, x):
        if x.device.type != "cpu" or x.dtype != torch.float32 or x.requires_grad or self.weight.requires_grad \
                or self.weight.numel() <= 2**18 or not torch.backends.mkldnn.is_available():
            return super().forward(x)
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


class Attention(nn.Module):
    def __init__(self, config, in_dim):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.qkv = Linear(in_dim, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.out = Linear(self.heads * self.head_dim, config.dim)
        self.q_norm, self.k_norm = (RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None for _ in "qk")

    def project(self, x, cos, sin):
        """x [B, N, in_dim] -> rotated q [B, heads, N, D], rotated k and v [B, kv_heads, N, D]."""
        H, G, D = self.heads, self.kv_heads, self.head_dim
        qk, v = self.qkv(x).view(*x.shape[:2], H + 2 * G, D).split([H + G, G], dim=2)
        norms = (self.q_norm.weight, self.k_norm.weight, H, self.q_norm.eps) if self.q_norm is not None else None
        q, k = rotate(qk, cos, sin, norms).split([H, G], dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, cos, sin, mask=None, prefix=None, layer=0, past=None):
        """Returns the attended x and the new keys and values (`past` ones in front, if given)."""
        q, k, v = self.project(x, cos, sin)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        if prefix is None:
            # On a GPU only the flash kernel shares key heads. It takes no float32: all N x N scores would be stored.
            shared = q.device.type == "cpu" or q.dtype == torch.bfloat16
            keys, values = (x if shared else x.repeat_interleave(self.heads // self.kv_heads, 1) for x in (k, v))
            out = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=shared)
        else:
            cache, length, sequence = prefix
            out = tree_attention(q, k, v, mask, cache.k[layer], cache.v[layer], length, sequence)
        return self.out(out.transpose(1, 2).flatten(2)), k, v


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up = Linear(config.dim, 2 * config.ffn_dim)
        self.down = Linear(config.ffn_dim, config.dim)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(config.dim, config.norm_eps), Attention(config, config.dim)
        self.ffn_norm, self.ffn = RMSNorm(config.dim, config.norm_eps), SwiGLU(config)


class Target(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.unembed = Linear(config.dim, config.vocab_size)
        if config.tied:
            self.unembed.weight = self.embed.weight
        self.register_buffer("frequencies", rotary_frequencies(config), persistent=False)

    def init_weights(self):
        """For training from scratch: residual outputs start at zero."""
        small_normal(self)
        for block in self.blocks:
            nn.init.zeros_(block.attn.out.weight)
            nn.init.zeros_(block.ffn.down.weight)
        return self

    def forward(self, tokens, positions=None, mask=None, prefix=None, keep_kv=True):
        """tokens [B, N]; without a prefix they are a causal sequence, else nodes at `positions` under `mask` [B, N, N].
        Returns hidden [B, N, dim], normed, for `logits`; features [B, N, 3 * dim], the inputs of the tapped layers;
        keys, values: per layer [B, kv_heads, N, D]; with keep_kv False empty lists, which saves gigabytes."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        cos, sin = rotation(positions, self.frequencies)
        x, delta = self.embed(tokens), None                                           # [B, N, dim]
        taps, keys, values = {}, [], []
        for i, block in enumerate(self.blocks):
            x, normed = block.attn_norm(x, delta)
            if i in self.config.taps:
                taps[i] = x
            delta, k, v = block.attn(normed, cos, sin, mask, prefix, layer=i)
            x, normed = block.ffn_norm(x, delta)
            delta = block.ffn(normed)
            if keep_kv:
                keys.append(k), values.append(v)
        _, hidden = self.norm(x, delta)
        return hidden, torch.cat([taps[i] for i in self.config.taps], dim=-1), keys, values

    def logits(self, hidden):
        return self.unembed(hidden)


def small_normal(module):
    for p in module.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.02)
    return module


def cast(module, dtype):
    """Change the parameters' type only: `module.to(bfloat16)` would round the rotary frequencies. None: leave it."""
    for p in module.parameters() if dtype else ():
        p.data = p.data.to(dtype)
    return module
