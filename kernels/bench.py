"""The kernels against what PyTorch offers and against what the GPU allows: `python -m kernels.bench [--quick]`.

Every time is the median of CUDA graph replays. A graph holds one call after another, each on its own copy of the large
input; together the copies are several times the L2 cache, so that every call finds it cold, as it is in a decoder that
has just read gigabytes of weights. Launch gaps between the kernels of a call are included: a decoder pays them too.

The floor of attention is max(bytes of keys and values / copy bandwidth, multiplications / matmul rate), with both
rates measured in the same run. Every result is first compared with float64.

Prints Markdown tables; the last line is the same numbers as one line of JSON.
"""
import argparse
import json
import statistics

import gto  # noqa: F401  first: thread settings
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gto.errors import UserError, main_guard
from kernels import acceptance, fused, tree_attention, triton

COLD = 256 * 2**20      # bytes of input a graph walks through: five times the L2 of an H200
D = 128                 # head size
DEVICE, DTYPE = "cuda", torch.bfloat16


def time_us(call, copies):
    """Microseconds of `call(i)`, i = 0 .. copies-1: median over graph replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):                                    # compiles and allocates outside of the capture
        for _ in range(3):
            call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            call(i)
    times = []
    for _ in range(23):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / copies)
    return statistics.median(times[3:])


def copies_of(size):
    return min(64, max(10, -(-COLD // size)))


def measure_peer(name, call, copies, check=None):
    """Time of a peer, or None with one line of explanation if it does not run here or is wrong."""
    try:
        if check is not None:
            check(call(0))
        return time_us(call, copies)
    except Exception as error:  # a peer may lack a kernel for a shape: the table then says so
        print(f"  {name}: {type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:150]}", flush=True)
        return None


def device_rates():
    """Copy bandwidth in bytes/s (reads plus writes) and bf16 matmul rate in operations/s."""
    x = torch.empty(2, 2**29, dtype=DTYPE, device=DEVICE)
    copy = time_us(lambda i: x[0].copy_(x[1]), 2)
    n = 8192
    a, b = torch.randn(2, n, n, dtype=DTYPE, device=DEVICE)
    matmul = time_us(lambda i: a @ b, 4)
    return 2 * x[0].nbytes / copy * 1e6, 2 * n**3 / matmul * 1e6


# ---------------------------------------------------------------------------------------------- tree attention

def random_mask(N):
    """Ancestors and self in a random tree, [N, N] bool."""
    mask = torch.eye(N, dtype=torch.bool)
    for j in range(1, N):
        mask[j] |= mask[torch.randint(j, ())]
    return mask.to(DEVICE)


@torch.compile(dynamic=True)
def tree_part_and_merge(q, k, v, bias, prefix_out, prefix_lse):
    """The masked tree part in plain PyTorch, merged with attention over the prefix by its log-sum-exp."""
    scores = (q @ k.transpose(-1, -2)).float() / D**0.5 + bias                        # [1, G, rows, N]
    lse = scores.logsumexp(-1, keepdim=True)
    out = ((scores - lse).exp().to(v.dtype) @ v).float()
    weight = torch.sigmoid(prefix_lse[..., None] - lse)
    return (out + weight * (prefix_out.float() - out)).to(q.dtype)


compiled_flex = torch.compile(flex_attention, dynamic=False)


def attention_calls(H, G, N, S):
    """{name: call(i)} for the kernel and its peers, the number of copies, and the float64 result."""
    T = -(-(S + N) // 16) * 16          # keys in all, padded so that SDPA need not pad its mask on every call
    copies = copies_of(2 * G * T * D * 2)
    q = torch.randn(1, H, N, D, dtype=DTYPE, device=DEVICE)
    K, V = torch.randn(2, copies, 1, G, T, D, dtype=DTYPE, device=DEVICE)             # prefix, tree, padding
    mask, length = random_mask(N), torch.tensor([S], device=DEVICE)
    visible = torch.cat([torch.ones(N, S, dtype=torch.bool, device=DEVICE), mask], dim=1)
    bias = torch.zeros(N, T, dtype=DTYPE, device=DEVICE)
    bias[:, :S + N].masked_fill_(~visible, float("-inf"))
    bias[:, S + N:] = float("-inf")
    folded = q.reshape(1, G, H // G * N, D)                            # GQA groups as rows, for all peers but flex
    bias = bias.repeat(H // G, 1)[None, None].expand(1, G, -1, -1)
    tree_bias = bias[..., S:S + N]

    def ours(i):
        return tree_attention.tree_attention_triton(q, K[i, :, :, S:S + N], V[i, :, :, S:S + N], mask[None],
                                                    K[i, :, :, :S], V[i, :, :, :S], length)

    def sdpa(i):
        return F.scaled_dot_product_attention(folded, K[i], V[i], attn_mask=bias).view(1, H, N, D)

    def flash(i):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(folded, K[i, :, :, :S], V[i, :, :, :S])
        return tree_part_and_merge(folded, K[i, :, :, S:S + N], V[i, :, :, S:S + N], tree_bias, out,
                                   lse).view(1, H, N, D)

    def sees(b, h, row, key):
        return (key < S) | ((key < S + N) & mask[row, (key - S).clamp(0, N - 1)])

    blocks = create_block_mask(sees, None, None, N, T, device=DEVICE)
    options = {"BLOCK_M": 64} if N * H // G > 128 else None

    def flex(i):
        return compiled_flex(q, K[i], V[i], block_mask=blocks, enable_gqa=H != G, kernel_options=options)

    target = torch.empty_like(K[0])

    def copy(i):                        # reads half of what attention reads and writes as much: the same traffic
        target.copy_(K[i])

    want = tree_attention.tree_attention_reference(
        q.double(), K[0, :, :, S:S + N].double(), V[0, :, :, S:S + N].double(), mask[None],
        K[0, :, :, :S].double(), V[0, :, :, :S].double(), length)
    return {"ours": ours, "sdpa": sdpa, "flex": flex, "two-part flash": flash, "copy": copy}, copies, want


def bench_attention(shapes, bandwidth, rate):
    rows = []
    for H, G, N, S in shapes:
        calls, copies, want = attention_calls(H, G, N, S)

        def check(out):
            error = ((out.double() - want).abs().max() / want.abs().max()).item()
            if not error < 2e-2:
                raise ValueError(f"differs from float64 by {error:.1e}")

        check(calls["ours"](0))
        row = {"heads": f"{H}/{G}", "N": N, "S": S}
        row.update({name: time_us(call, copies) if name in ("ours", "copy") else measure_peer(name, call, copies, check)
                    for name, call in calls.items()})
        memory, tensor = 2 * G * (S + N) * D * 2 / bandwidth * 1e6, 4 * N * H * S * D / rate * 1e6
        row["floor"], row["bound"] = max(memory, tensor), "memory" if memory > tensor else "tensor"
        row["ours / floor"] = row["ours"] / row["floor"]
        peers = [row[name] for name in ("sdpa", "flex", "two-part flash") if row[name] is not None]
        row["best peer / ours"] = min(peers) / row["ours"] if peers else None
        print(f"  heads {H}/{G}, N {N}, S {S}: {row['ours']:.1f} us", flush=True)
        rows.append(row)
    return rows


# --------------------------------------------------------------------------- acceptance scoring and fused steps

def torch_scoring(logits, tokens, parents, temperature):
    """softmax + gather + argmax or a draw: what one would write without a kernel. torch.multinomial makes the same
    draw, argmax of p / exponential noise, but waits for the host to check p: no graph could hold it."""
    log_p = (logits.float() / (temperature or 1.0)).log_softmax(-1)                   # [1, N, V]
    log_prob = log_p[0, parents[0], tokens[0]]
    if temperature == 0:
        return logits.argmax(-1), log_prob
    return (log_p.exp() / torch.empty_like(log_p).exponential_()).argmax(-1), log_prob


def bench_scoring(N=60, V=128_256):
    copies = copies_of(N * V * 2)
    logits = torch.randn(copies, 1, N, V, dtype=DTYPE, device=DEVICE) * 3
    tokens = torch.randint(V, (1, N), device=DEVICE)
    parents = (torch.arange(N, device=DEVICE) - 1).clamp(min=0)[None]
    target = torch.empty_like(logits[0])
    copy = time_us(lambda i: target.copy_(logits[i]), copies)
    compiled = torch.compile(torch_scoring, dynamic=False)
    rows = []
    for temperature in 0.0, 1.0:
        def ours(i):
            uniform = torch.rand(1, N, device=DEVICE) if temperature else None
            return acceptance.score_nodes_triton(logits[i], tokens, parents, temperature, uniform)

        choice, log_prob = ours(0)
        want = logits[0].double().log_softmax(-1)[0, parents[0], tokens[0]]
        error = (log_prob[0, 1:] - want[1:]).abs().max().item()
        if not error < 1e-4 or temperature == 0 and not torch.equal(choice, logits[0].argmax(-1)):
            raise ValueError(f"scoring differs from float64 by {error:.1e}")
        row = {"T": temperature, "ours": time_us(ours, copies)}
        row["torch"] = measure_peer("torch", lambda i: torch_scoring(logits[i], tokens, parents, temperature), copies)
        row["compiled torch"] = measure_peer(
            "compiled torch", lambda i: compiled(logits[i], tokens, parents, temperature), copies)
        row["copy of the logits"], row["ours / copy"] = copy, row["ours"] / copy
        print(f"  scoring T={temperature}: {row['ours']:.1f} us", flush=True)
        rows.append(row)
    return rows


def bench_small_steps():
    """The steps that are short whatever runs them: here the number of launches decides. Warm inputs."""
    rows = []
    mask = random_mask(60).expand(128, -1, -1).contiguous()
    parents = (mask & ~torch.eye(60, dtype=torch.bool, device=DEVICE)).float().mul(
        torch.arange(1, 61, device=DEVICE)).argmax(-1)                                # the last ancestor
    tokens = torch.randint(1000, (128, 60), device=DEVICE)
    choice, log_prob = torch.randint(1000, (128, 60), device=DEVICE), -torch.rand(128, 60, device=DEVICE)
    steps = {
        "accept, 1 tree": (acceptance, "accept", (tokens[:1], parents[:1], mask[:1], choice[:1], 9)),
        "tree_reward, 128 trees": (acceptance, "tree_reward", (log_prob, parents, mask)),
    }
    for N in 1, 60:
        x, delta = torch.randn(2, 1, N, 4096, dtype=DTYPE, device=DEVICE)
        qkv, gate_up = (torch.randn(1, N, C, dtype=DTYPE, device=DEVICE) for C in (48 * D, 2 * 14336))
        angles = torch.rand(1, N, D // 2, device=DEVICE)
        heads = qkv.view(1, N, 48, D)[:, :, :40]
        steps[f"add_rms_norm, {N} tokens"] = fused, "add_rms_norm", (x, delta, x[0, 0], 1e-5)
        steps[f"rotate, {N} tokens"] = fused, "rotate", (heads, angles.cos(), angles.sin())
        steps[f"silu_mul, {N} tokens"] = fused, "silu_mul", (gate_up,)
    for name, (module, step, arguments) in steps.items():
        kernel, reference = getattr(module, step + "_triton"), getattr(module, step + "_reference")
        rows.append({"step": name, "ours": time_us(lambda i: kernel(*arguments), 20),
                     "torch": measure_peer(name, lambda i: reference(*arguments), 20)})
    return rows


def table(title, rows):
    def cell(value):
        return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    print(f"\n{title}\n\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(cell, row.values())) + " |")


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="attention at a prefix of 4,096 only")
    quick = parser.parse_args().quick
    if not torch.cuda.is_available():
        raise UserError("the benchmark needs an NVIDIA GPU; on a CPU the kernels' tests run: pytest tests/test_kernels.py")
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64                          # flex_attention compiles once per shape
    bandwidth, rate = device_rates()
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
              "copy TB/s": bandwidth / 1e12, "matmul TFLOP/s": rate / 1e12}
    print(", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{v}" for k, v in result.items()), flush=True)
    shapes = [(32, G, N, S) for G in (8, 32) for S in ((4096,) if quick else (512, 4096, 32768)) for N in (1, 16, 60)]
    result["attention"] = bench_attention(shapes, bandwidth, rate)
    result["scoring"] = bench_scoring()
    result["small steps"] = bench_small_steps()
    table("Tree attention, microseconds, bf16, D = 128, one sequence", result["attention"])
    table("Acceptance scoring, microseconds, bf16 logits of 60 nodes x 128,256 tokens", result["scoring"])
    table("Small steps, microseconds", result["small steps"])
    print(json.dumps(result))


if __name__ == "__main__":
    main_guard(main)
