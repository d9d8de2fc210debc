"""How far a draft-verify cycle is from the hardware's limit, at the shapes of real targets, with random weights.

A cycle's cost does not depend on what the weights are. Cycle efficiency = T_AR / T_cycle is the speed-up per token of
tau: a head that reaches tau = 6 at efficiency 0.65 decodes 3.9 times as fast as plain decoding.
"""
import statistics

import torch

from gto.engine import Engine, graph_of
from gto.head import DraftHead, HeadConfig
from gto.model import ModelConfig, Target
from gto.tree import TreeShape

LLAMA31_ROPE = dict(rope_theta=5e5, rope_scaling=(8.0, 1.0, 4.0, 8192))
SHAPES = {  # target, head's differences
    "llama-3.1-8b": (ModelConfig(128256, 32, 4096, 32, 8, 128, 14336, 131072, tied=False, **LLAMA31_ROPE), 32000),
    "qwen3-8b": (ModelConfig(151936, 36, 4096, 32, 8, 128, 12288, 40960, 1e-6, 1e6, tied=False, qk_norm=True), 32000),
    "vicuna-13b": (ModelConfig(32000, 40, 5120, 40, 40, 128, 13824, 2048, 1e-6, tied=False), 32000),
}


def random_models(name, device="cuda", dtype=torch.bfloat16):
    """A target and a head of this shape, weights small and random."""
    config, draft_vocab_size = SHAPES[name]
    head_config = HeadConfig(**{**vars(config), "layers": 1, "qk_norm": False, "rope_scaling": None}, target_dim=config.dim,
                             draft_vocab_size=draft_vocab_size)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            target, head = Target(config), None
            head = DraftHead(head_config, target)
    finally:
        torch.set_default_dtype(torch.float32)
    for p in (*target.parameters(), *head.parameters()):
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02)
    return target.requires_grad_(False), head.requires_grad_(False)


def milliseconds(run, repeats=20, queued=4):
    """Median time of `run()` on the device, after two warm-up rounds. Some are queued at a time: as in decoding, the
    device does not wait for the next launch."""
    times = []
    for i in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(queued):
            run()
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(end) / queued)
    return statistics.median(times)


def ceilings():
    """What this device reaches on a plain copy, bytes/s read and written together, and on a bf16 matmul, FLOP/s."""
    x = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy = 2 * x.nbytes / milliseconds(lambda: y.copy_(x)) * 1e3
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return copy, 2 * 8192 ** 3 / milliseconds(lambda: a @ a) * 1e3


@torch.no_grad()
def measure(target, head, context, tree, copy):
    """One row of the table: times in ms at this context length."""
    shape = TreeShape.parse(tree)
    weights = sum(p.nbytes for p in target.parameters()) - target.embed.weight.nbytes * (not target.config.tied)

    def engine(head):
        e = Engine(target, head, shape, capacity=context + 128)
        for cache in filter(None, (e.target_cache, e.head_cache)):
            cache.k.normal_(), cache.v.normal_()
        e.length.fill_(context), e.features.normal_()
        return e

    plain, speculative = engine(None), engine(head)
    row = {"context": context, "tree": tree, "T_AR": milliseconds(graph_of(plain.cycle))}
    tree = speculative.draft()
    row["T_draft"] = milliseconds(graph_of(speculative.draft))
    row["T_verify"] = milliseconds(graph_of(lambda: speculative.check(tree)))
    row["T_cycle"] = milliseconds(graph_of(speculative.cycle))
    kv = 2 * plain.target_cache.k[..., :context, :].nbytes
    row["AR_GB/s"] = (weights + kv) / row["T_AR"] / 1e6
    row["AR_of_copy"] = row["AR_GB/s"] * 1e9 / copy
    row["verify_TFLOP/s"] = 2 * weights / 2 * (shape.nodes + 1) / row["T_verify"] / 1e9
    row["efficiency"] = row["T_AR"] / row["T_cycle"]
    return row


def table(name, contexts=(512, 2048, 8192), trees=("10,8,59", "1,7,7")):
    """Prints the Markdown table of one shape and returns its rows."""
    copy, matmul = ceilings()
    print(f"{name}, random bf16 weights, {torch.cuda.get_device_name()}, torch {torch.__version__}: device copy"
          f" {copy / 1e9:.0f} GB/s, matmul {matmul / 1e12:.0f} TFLOP/s\n")
    target, head = random_models(name)
    rows = [measure(target, head, context, tree, copy) for context in contexts for tree in trees]
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    return rows
