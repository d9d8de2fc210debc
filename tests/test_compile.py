"""Ahead-of-time compilation of the kernels for real GPUs, on any machine: what the interpreter lets pass (a loop
variable that changes its type, a variable defined in one branch only) and what it cannot see (shared memory, spills).

Run as a program it compiles for some architectures, `python tests/test_compile.py 80 90`, and prints a line for each
kernel.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

# Bytes of shared memory a program may use: A100, RTX 3090, RTX 4090, H100 / H200, RTX 5090. On sm_75 (T4) plain PyTorch
# does the work: products in half precision would spill kilobytes a thread there, and bfloat16 is emulated.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}
SHARES = (80, 86), (90, 89, 120)           # of two processes side by side: the test takes half a minute on two cores
ATTENTION_ONLY = 86, 89, 120               # sm_80's instructions, less shared memory: only what comes near the limit


def test_default_configurations_fit():
    pytest.importorskip("triton")
    source = "".join(path.read_text() for path in Path(__file__).parent.parent.glob("kernels/*.py"))
    # The interpreter is chosen when triton is imported: compiling needs a process without it.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    runs = [subprocess.Popen([sys.executable, __file__, *map(str, share)], env=env, stdout=subprocess.PIPE, text=True)
            for share in SHARES]
    kernels = [json.loads(line) for run in runs for line in run.communicate()[0].splitlines()]
    assert not any(run.returncode for run in runs)
    for sm in SHARED_LIMIT:
        expected = re.findall(r"def (_attention_kernel|_combine_kernel)\(" if sm in ATTENTION_ONLY else
                              r"def (\w+_kernel)\(", source)
        assert {k["kernel"] for k in kernels if k["sm"] == sm} == set(expected)
    for k in kernels:
        assert k["shared"] <= SHARED_LIMIT[k["sm"]], k
        assert k["stack"] in (0, None), f"registers spill: {k}"                  # None: no cuobjdump to ask


def compile_only(sm):
    """Make every kernel launch a compilation for `sm`; returns the list the compiled kernels end up in."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction
    compiled = []

    def compile(kernel, grid, args, options):
        assert max(grid[1:], default=1) < 2**16, f"{kernel.__name__}: a GPU has no grid {grid}"
        compiled.append((kernel.__name__, kernel.run(*args, grid=grid, warmup=True, **options)))

    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_device=lambda: sm, get_current_stream=lambda device=None: 0,
        get_current_target=lambda: GPUTarget("cuda", sm, 32)))
    JITFunction.__getitem__ = lambda kernel, grid: lambda *args, **options: compile(kernel, grid, args, options)
    return compiled


def stack(cubin):
    """Bytes of stack a thread needs, where spilled registers go; None where triton comes without cuobjdump."""
    import triton
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def call_attention(torch, tree_attention, settings):
    """The wrapper at an 8B model's shapes: 32/8 heads, trees of 60 nodes, 10 a level."""
    for dtype, B, N, M, D in ((torch.bfloat16, 1, 60, 60, 128),     # verification. float16 is bfloat16's twin: as wide
                              (torch.bfloat16, 1, 10, 80, 128),     # drafting
                              (torch.bfloat16, 1, 60, 60, 256),     # wide heads
                              (torch.bfloat16, 128, 60, 60, 80),    # the reward's target forward: no split
                              (torch.bfloat16, 1, 1, 1, 128),       # one-token decoding
                              (torch.float32, 1, 60, 60, 128))[:settings]:             # exact decoding
        q, k = (torch.empty(B, n, heads, D, dtype=dtype).transpose(1, 2) for n, heads in ((N, 32), (M, 8)))
        cache, length = torch.empty(B, 8, 4096, D, dtype=dtype), torch.zeros(B, dtype=torch.long)
        mask = torch.ones(B, N, M, dtype=torch.bool)
        tree_attention.tree_attention_triton(q, k, k, mask, cache, cache, length, length if B > 1 else None)


def call_the_rest(torch):
    """The other wrappers at an 8B model's shapes; they compute in float32 whatever they are given."""
    from kernels import acceptance, fused

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype)

    tokens, uniform = torch.zeros(1, 60, dtype=torch.long), torch.zeros(1, 60)
    acceptance.score_nodes_triton(empty(1, 60, 128_256))
    acceptance.score_nodes_triton(empty(2048, 60, 300))    # as many rows as a training step may have
    for temperature in 0.0, 0.7:
        acceptance.score_nodes_triton(empty(1, 60, 128_256), tokens, tokens, temperature, uniform)
    for module in acceptance, fused:
        module.use_triton = lambda x: True
    for k in 10, 1:
        acceptance.propose(empty(1, k, 32_000), torch.arange(32_000), k, 1.0)
    for m, M in (1, 0), (10, 70):                          # the second level's frontier, and the last one's
        fused.frontier(empty(1, 10 * m, dtype=torch.float32), torch.zeros(1, 10 * m, dtype=torch.long),
                       empty(1, m, 4096), torch.ones(1, m, M, dtype=torch.bool), 10)
    x, weight, head_weight = empty(1, 60, 4096), empty(4096), empty(128)
    fused.add_rms_norm(x, x, weight, 1e-5)
    fused.add_rms_norm(x, None, weight, 1e-5)
    fused.embed_norm_cat(tokens, empty(1000, 4096), weight, x, weight, 1e-5)
    for norms in None, (head_weight, head_weight, 32, 1e-5):
        fused.rotate(empty(1, 60, 48, 128)[:, :, :40], *empty(2, 1, 60, 64, dtype=torch.float32), norms)


def main(*architectures):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch

    from kernels import tree_attention
    for sm in architectures:
        compiled = compile_only(sm)
        call_attention(torch, tree_attention, settings=3 if sm in ATTENTION_ONLY else 6)
        if sm not in ATTENTION_ONLY:
            call_the_rest(torch)
        for name, kernel in compiled:
            shared = kernel.metadata.shared
            print(json.dumps({"sm": sm, "kernel": name, "shared": shared, "stack": stack(kernel.asm["cubin"])}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
