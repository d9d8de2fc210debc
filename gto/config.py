"""Every number of the experiment, in one place. Each field is also a flag of train.py: --omega 0.3."""
from dataclasses import dataclass, fields

import torch

from gto.tree import TreeShape
from gto.util import MOST, UserError, compute_dtype


@dataclass
class Config:
    # data
    dataset: str = "stdlib"        # see prepare_data.py
    vocab_size: int = 2048
    length: int = 256              # tokens per training sequence

    # target: deep and narrow, so that a draft is cheap next to a target step
    layers: int = 16
    dim: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    ffn_dim: int = 256
    target_steps: int = 680
    target_batch: int = 4          # sequences at a time
    target_accumulate: int = 1     # of such batches in a step
    muon_lr: float = 0.02          # hidden matrices
    adam_lr: float = 3e-2          # embedding and norms: at small rates the tied embedding is what learns too slowly

    # text that the target writes itself, to train heads on: half greedy, half sampled at T=1
    texts: int = 512               # sequences
    text_batch: int = 64           # of them at a time, all greedy or all sampled
    prompt_length: int = 32        # tokens of the corpus each begins with

    # draft head, phase I: token-level training
    head_ffn_dim: int = 384        # 0: the target's
    draft_vocab_size: int = 1024   # the tokens that are most frequent in the target's own text
    unroll: int = 2                # steps of the training-time test behind the first; 4 learn less in the same time
    head_steps: int = 1000
    head_batch: int = 4
    head_lr: float = 2e-2          # output and norms, by AdamW
    head_muon_lr: float = 0.05     # hidden matrices, by Muon; 0: AdamW for all
    label_temperature: float = 0.5  # below 1: labels sharpened towards the target's arg-max; 1: EAGLE-3's

    # phase II: Group Tree Optimization
    gto_steps: int = 100           # of the first objective; the others and the control get its time
    gto_batch: int = 4             # sequences per step of it
    gto_rate: float = 0.2          # learning rates of phase II and of its control, relative to phase I
    rollout_steps: int = 4         # steps that learn from the same trees; the paper's: 1
    groups: int = 4                # K, per sequence; the paper's: 16
    group_size: int = 8            # m adjacent positions
    objectives: str = "gto,keep"   # a head each, see OBJECTIVES in gto/loss.py; the last is decode.py's
    omega: float = 0.5             # L = L_token + omega * L_objective
    eps: float = 0.2               # clip of the ratio; the paper does not state it
    delta: float = 1e-4            # keeps the standardisation finite; the paper does not state it
    aggregator: str = "lse"        # lse, max, mean or expected
    eta: float = 1.0               # sharpness of lse
    debias: bool = True
    clip: float = 0.5              # gradient norm, phase I and II
    warmup: int = 20               # steps of rising learning rate, phase I and II
    accumulate: int = 1            # batches of a step, phase I and II: for those that do not fit at once
    seeds: int = 2                 # phase II and its control are repeated with this many seeds

    # the draft tree of phase II and of the evaluation
    tree: str = "8,5,24"           # children, depth, nodes

    # evaluation
    eval_prompts: int = 64
    eval_tokens: int = 128
    seed: int = 1337


PRESETS = {
    "laptop": Config(),            # 10 to 20 minutes on two cores
    # Every step of the way in half a minute: to see that a change runs. Its figures mean nothing.
    "smoke": Config(layers=4, dim=64, heads=2, kv_heads=1, ffn_dim=128, length=128, target_steps=60, texts=128,
                    head_ffn_dim=128, head_steps=40, gto_steps=6, seeds=1, tree="4,3,8", eval_prompts=16,
                    eval_tokens=48),
    "gpu": Config(dataset="python", vocab_size=16384, length=512, layers=12, dim=768, heads=12, kv_heads=4, head_dim=64,
                  ffn_dim=2048, target_steps=3500, target_batch=32, target_accumulate=4, adam_lr=3e-3, texts=8192,
                  text_batch=512, head_ffn_dim=2048, draft_vocab_size=16384, head_steps=3000, head_batch=16,
                  head_lr=3e-3, head_muon_lr=0.02, gto_steps=400, gto_batch=8, label_temperature=1.0, tree="10,7,60",
                  eval_tokens=256),
    # In half an hour on a GPU of 8 GB, or one without bfloat16 (not measured).
    "gpu-small": Config(dataset="python", vocab_size=8192, length=512, layers=12, dim=384, heads=6, kv_heads=2,
                        head_dim=64, ffn_dim=1024, target_steps=1000, target_batch=16, target_accumulate=2,
                        adam_lr=1e-2, texts=2048, text_batch=256, head_ffn_dim=1024, draft_vocab_size=8192,
                        head_steps=1500, head_batch=8, head_lr=6e-3, head_muon_lr=0.03, gto_steps=150, gto_batch=4,
                        label_temperature=1.0, tree="10,7,60"),
    # For a released chat model of 100 to 200 million parameters, in about an hour on two cores.
    "chat": Config(texts=640, head_ffn_dim=0, draft_vocab_size=4096, head_steps=350, head_batch=8, head_lr=3e-3,
                   head_muon_lr=0.08, gto_steps=60, gto_batch=2, seeds=1, eval_tokens=64),
    # For a released target (train.py --target): the paper's numbers, its AdamW included. Phase I as EAGLE-3's.
    "real": Config(length=2048, head_ffn_dim=0, draft_vocab_size=32000, unroll=6, head_steps=60_000, head_batch=1,
                   head_lr=5e-5, head_muon_lr=0.0, label_temperature=1.0, gto_steps=60_000, gto_batch=1, gto_rate=0.1,
                   rollout_steps=1, groups=16, warmup=1000, accumulate=2, seeds=1, tree="10,7,60")}

CHOICES = {"dataset": ("stdlib", "python"), "aggregator": ("lse", "max", "mean", "expected"), "debias": (True, False),
           "rollout_steps": (1, 2, 4, 5, 8, 10, 20, 40)}  # divisors of gto.training.SAVE_EVERY
LEAST = dict.fromkeys(("head_ffn_dim", "unroll", "warmup", "seed", "head_muon_lr", "muon_lr", "omega", "delta", "eps"),
                      0) | {"eval_prompts": 4, "eval_tokens": 2}
LARGEST = 999_999    # whole number: a size or step count beyond it is a slip


def check(c):
    """The config itself; a UserError that names the flag if a number cannot be right."""
    for field in fields(c):
        name, kind, value = field.name, field.type, getattr(c, field.name)
        least = LEAST.get(name, 1 if kind is int else 1e-30)
        most = LARGEST if kind is int and name != "seed" else MOST
        fits = isinstance(value, (int, float) if kind is float else kind) and value in CHOICES.get(name, (value,))
        if not fits or kind in (int, float) and not least <= value <= most:
            wanted = ", ".join(map(str, CHOICES.get(name, ()))) or f"{kind.__name__} from {least:g} to {most}"
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {wanted}")
    tree = TreeShape.parse(c.tree)
    if c.heads % c.kv_heads or c.head_dim % 2:
        raise UserError(f"--heads {c.heads} must be a multiple of --kv-heads {c.kv_heads}; --head-dim must be even")
    if tree.top_k > min(c.draft_vocab_size, c.vocab_size):
        raise UserError(f"--tree {tree}: a head of --draft-vocab-size {c.draft_vocab_size} has not so many children")
    if c.length <= max(c.prompt_length, c.unroll + 2, c.group_size + tree.depth + 1):
        raise UserError(f"--length {c.length}: too short for --prompt-length, --unroll, or --group-size and the --tree")
    return c


def fitting(device, released):
    """The preset for a device, to train a target or for a released one: by a GPU's memory, and whether it is fast."""
    large = compute_dtype(device) == torch.bfloat16 and torch.cuda.get_device_properties(device).total_memory > 20e9
    sizes = ("chat", "chat", "real") if released else ("laptop", "gpu-small", "gpu")
    return sizes[(torch.device(device).type == "cuda") + large]
