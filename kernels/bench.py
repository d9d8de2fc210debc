"""Are the kernels faster than what PyTorch offers? One table per question, on one GPU: python -m kernels.bench

A time is the median over replays of a CUDA graph of calls that walk over copies of the large input, several L2 caches
of them: each finds it cold. "copy" is what moving bytes alone takes: of the keys, or of the logits."""
import argparse

import torch
from torch.nn import functional as F

from kernels import acceptance, tree_attention, triton

COLD, D = 256 * 2**20, 128                     # bytes to walk over, five L2 caches of an H200; head size


def randn(*shape):
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def microseconds(calls, copies, want, tolerance):
    """{name: call(i), i = 0 .. copies-1} -> {name: microseconds a call}; AssertionError if one is wrong."""
    times = {}
    for name, call in calls.items():
        if name != "copy":
            torch.testing.assert_close(call(0).reshape(want.shape).to(want), want, atol=tolerance, rtol=tolerance)
        times[name] = 1000 / copies * triton.testing.do_bench_cudagraph(
            lambda: [call(i) for i in range(copies)], return_mode="median")
    return times


def attention(H, G, N, S):
    """A tree of N nodes behind a prefix of S tokens, H query and G key heads."""
    T = triton.cdiv(S + N, 16) * 16                                    # padded, or SDPA pads its mask in every call
    copies = 1 + COLD // (2 * G * T * D * 2)
    q, K, V = randn(1, H, N, D), randn(copies, 1, G, T, D), randn(copies, 1, G, T, D)
    mask = (torch.rand(N, N) < 0.2).tril() | torch.eye(N, dtype=torch.bool)  # its density is a tree's
    visible = torch.cat([mask.new_ones(N, S), mask, mask.new_zeros(N, T - S - N)], dim=1).cuda()
    rows, sees = q.view(1, G, H // G * N, D), visible.repeat(H // G, 1)  # heads that share keys become rows
    bias, tree = q.new_zeros(sees.shape).masked_fill(~sees, float("-inf")), slice(S, S + N)
    length, target = torch.tensor([S], device="cuda"), torch.empty_like(K[0])
    calls = {
        "ours": lambda i: tree_attention.tree_attention(
            q, K[i, :, :, tree], V[i, :, :, tree], visible[None, :, tree], K[i], V[i], length),
        "SDPA": lambda i: F.scaled_dot_product_attention(rows, K[i], V[i], attn_mask=bias),
        "copy": lambda i: target.copy_(K[i])}                          # reads and writes: as many bytes as K and V
    want = F.scaled_dot_product_attention(rows.double(), K[0].double(), V[0].double(), attn_mask=sees).view_as(q)
    return {"heads": f"{H}/{G}", "nodes": N, "prefix": S} | microseconds(calls, copies, want, 2e-2)


def reading(operation, log_prob, N, V, *rest):
    """`operation` on N rows of V logits and the rest; `log_prob`: which of its results, the one to compare."""
    copies = 1 + COLD // (N * V * 2)
    logits, target = 3 * randn(copies, 1, N, V), randn(1, N, V)
    plain = torch.enable_grad()(operation)                             # with gradients on it is plain PyTorch
    compiled = torch.compile(plain, dynamic=False)
    calls = {"ours": lambda i: operation(logits[i], *rest)[log_prob],
             "compiled PyTorch": lambda i: compiled(logits[i], *rest)[log_prob],
             "copy": lambda i: target.copy_(logits[i])}
    return microseconds(calls, copies, plain(logits[0].double(), *rest)[log_prob], 1e-4)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser("python -m kernels.bench", argparse.SUPPRESS, __doc__.splitlines()[0])
    parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU; without one: python -m pytest tests/test_kernels.py")
    torch.manual_seed(0)
    # The nodes to score are a chain; 32,000 tokens are an EAGLE-3 head's vocabulary.
    tokens, uniform = torch.randint(128_256, (1, 60), device="cuda"), torch.rand(1, 60, device="cuda")
    parents, token_ids = (torch.arange(60, device="cuda") - 1).clamp(min=0)[None], torch.arange(32_000, device="cuda")
    questions = {
        "tree attention": [attention(32, G, N, S) for G in (8, 32) for N in (1, 16, 60) for S in (512, 4096, 32768)],
        "scoring 60 nodes x 128,256 logits": [
            {"temperature": T} | reading(acceptance.score_nodes, 1, 60, 128_256, tokens, parents, T, uniform)
            for T in (0.0, 1.0)],
        "the 10 best of 32,000 logits": [
            {"nodes": N} | reading(acceptance.propose, 0, N, 32_000, token_ids, 10, 1.0) for N in (1, 10)]}
    for question, rows in questions.items():
        print(f"\nmicroseconds: {question}, bf16\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
        for row in rows:
            print("|", " | ".join(f"{x:.1f}" if isinstance(x, float) else str(x) for x in row.values()), "|")


if __name__ == "__main__":
    main()
