"""The draft head: EAGLE-3, one decoder layer over fused target features and the next token's embedding.
Slot t pairs the target's feature at position t with the embedding of token t+1 and predicts token t+2. Where the
target has not been yet, in a draft, the head's own output takes the place of the feature."""
from dataclasses import dataclass

import torch
from torch import nn

from gto.model import KV, Attention, Linear, ModelConfig, RMSNorm, SwiGLU, rotary_frequencies, rotation
from gto.util import UserError
from kernels.fused import embed_norm_cat


@dataclass
class HeadConfig(ModelConfig):
    """One layer's numbers; `vocab_size` is the target's, `draft_vocab_size` what the head can propose."""
    layers: int = 1
    draft_vocab_size: int = 2048
    target_dim: int = 128
    own_embedding: bool = False   # heads narrower than their target carry an embedding of their own

    def check_fits(self, target):
        """The config itself; a UserError if a head with these numbers drafts for another target."""
        if (self.target_dim, self.vocab_size) != (target.config.dim, target.config.vocab_size):
            raise UserError(f"it is for another target, of dim {self.target_dim} and {self.vocab_size} tokens")
        return self


class DraftHead(nn.Module):
    def __init__(self, config, target=None):
        """`target` lends its frozen embedding, unless the head has its own."""
        super().__init__()
        self.config = config
        if config.own_embedding:
            self.embed = nn.Embedding(config.vocab_size, config.dim)
        else:  # kept in a tuple, out of sight of nn.Module: neither a parameter nor in the checkpoint of the head
            self._lent = (target.embed,)
        self.fc = Linear(3 * config.target_dim, config.dim)
        self.token_norm, self.feature_norm = RMSNorm(config.dim, config.norm_eps), RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config, 2 * config.dim)
        self.ffn_norm, self.ffn = RMSNorm(config.dim, config.norm_eps), SwiGLU(config)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.unembed = Linear(config.dim, config.draft_vocab_size)
        # draft id -> target id; EAGLE's files store the difference d2t = token_ids - arange
        self.register_buffer("token_ids", torch.arange(config.draft_vocab_size))
        self.register_buffer("frequencies", rotary_frequencies(config), persistent=False)

    def fuse(self, features):
        """The target's low, middle and high features [..., 3 * target_dim] -> [..., dim]."""
        return self.fc(features.to(self.fc.weight.dtype))

    def inputs(self, hidden, tokens, positions):
        """hidden [B, N, dim], tokens and positions [B, N] -> attention input [B, N, 2 * dim], cos, sin."""
        embed = self.embed if self.config.own_embedding else self._lent[0]
        x = embed_norm_cat(tokens, embed.weight, self.token_norm.weight, hidden, self.feature_norm.weight,
                           self.config.norm_eps)
        return x, *rotation(positions, self.frequencies)

    def outputs(self, hidden, attended):
        """The residual is the un-normed input. The sum, before `norm`, is the next step's feature."""
        x, normed = self.ffn_norm(hidden, attended)
        return x + self.ffn(normed)

    def forward(self, hidden, tokens, positions, mask=None, prefix=None, past=None):
        """hidden [B, N, dim]: fused target features, or the parents' outputs; tokens, positions [B, N].
        Without a prefix the slots are a causal sequence, else nodes under `mask` [B, N, M].
        Returns hidden [B, N, dim] for `logits` and children; keys, values [B, kv_heads, M, D], `past` included."""
        x, cos, sin = self.inputs(hidden, tokens, positions)
        attended, k, v = self.attn(x, cos, sin, mask, prefix, past=past)
        return self.outputs(hidden, attended), k, v

    def logits(self, hidden):
        """[..., dim] -> [..., draft_vocab_size], over draft ids; `token_ids` maps them to the target's."""
        return self.unembed(self.norm(hidden)[1])

    def read(self, features, tokens):
        """Whole texts: features [B, T, 3 * target_dim], tokens [B, T] -> hidden [B, T, dim], KV. The last slot, which
        lacks its next token, is not to be used."""
        slots = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden, k, v = self(self.fuse(features), tokens.roll(-1, dims=1), slots)
        return hidden, KV([k], [v])

    def unroll(self, features, tokens, roots, chains):
        """Draft along given chains, with gradient: EAGLE-3's training-time test, and GTO's log-probabilities.
        features [B, T, 3 * target_dim], tokens [B, T] of texts; roots [B, R] slots where chains start;
        chains [B, R, J] the tokens drafted after each root slot's prediction, in order.
        Returns hidden [B, R, J+1, dim]: `[:, r, j]` predicts chain token j of root r, having read tokens 0 .. j-1.
        It attends to the true slots up to the root, as in decoding, and to its own chain's earlier steps."""
        (B, T), (R, J) = tokens.shape, chains.shape[1:]
        hidden, ((k_true,), (v_true,)) = self.read(features, tokens)
        hidden = hidden.gather(1, roots[..., None].expand(B, R, hidden.shape[-1]))    # [B, R, dim]
        unseen = torch.arange(T, device=roots.device) > roots[..., None]              # [B, R, T]
        steps, chain_kv = [hidden], []
        for j in range(J):
            x, cos, sin = self.inputs(hidden, chains[:, :, j], roots + j + 1)
            q, k, v = self.attn.project(x, cos, sin)                                  # [B, heads|kv_heads, R, D]
            chain_kv.append((k, v))
            attended = attend_chain(q, k_true, v_true, unseen, chain_kv)              # [B, R, heads * D]
            hidden = self.outputs(hidden, self.attn.out(attended))
            steps.append(hidden)
        return torch.stack(steps, dim=2)


def attend_chain(q, k_true, v_true, unseen, chain_kv):
    """One step of R chains: attention to the true slots, and to each chain's own steps so far.
    q [B, heads, R, D]; k_true, v_true [B, kv_heads, T, D]; unseen [B, R, T] bool: true slots behind a chain's root;
    chain_kv [(k, v)] by step, [B, kv_heads, R, D] each. Own keys are one dot product each: they need no mask."""
    (B, H, R, D), (G, T) = q.shape, k_true.shape[1:3]
    q = q.view(B, G, H // G, R, D) * D ** -0.5
    true = torch.einsum("bghrd,bgtd->bghrt", q, k_true).masked_fill(unseen[:, None, None], float("-inf"))
    own = torch.stack([(q * k[:, :, None]).sum(-1) for k, _ in chain_kv], dim=-1)     # [B, G, H / G, R, steps]
    weight = torch.cat([true, own], dim=-1).float().softmax(-1).to(q.dtype)
    attended = torch.einsum("bghrt,bgtd->bghrd", weight[..., :T], v_true)
    for i, (_, v) in enumerate(chain_kv):
        attended = attended + weight[..., T + i, None] * v[:, :, None]
    return attended.permute(0, 3, 1, 2, 4).flatten(2)                                 # [B, R, heads * D]
