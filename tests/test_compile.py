"""Ahead-of-time compilation of the kernels for real GPUs, on any machine: what the interpreter lets pass (a loop
variable that changes its type, a variable defined in one branch only) and what it cannot see (shared memory, spills).

Run as a program it compiles for one architecture, `python tests/test_compile.py 90`, and prints a line for each kernel.
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

SHARED_LIMIT = {80: 166_912, 90: 232_448}  # bytes a program may use: A100, H100 / H200


def test_default_configurations_fit():
    pytest.importorskip("triton")
    source = "".join(path.read_text() for path in Path(__file__).parent.parent.glob("kernels/*.py"))
    # The interpreter is chosen when triton is imported: compiling needs a process without it. Two run side by side.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    runs = {sm: subprocess.Popen([sys.executable, __file__, str(sm)], env=env, stdout=subprocess.PIPE, text=True)
            for sm in SHARED_LIMIT}
    for sm, run in runs.items():
        kernels = [json.loads(line) for line in run.communicate()[0].splitlines()]
        assert run.returncode == 0
        assert {k["kernel"] for k in kernels} == set(re.findall(r"def (\w+_kernel)\(", source))
        for k in kernels:
            assert k["shared"] <= SHARED_LIMIT[sm], k
            assert k["stack"] in (0, None), f"registers spill: {k}"              # None: no cuobjdump to ask


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
        get_current_device=lambda: 0, get_current_stream=lambda device=None: 0,
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


def call_everything(torch, dtype):
    """The wrappers at an 8B model's shapes: 32/8 heads of 128, vocabulary 128,256, trees of 60 nodes, 10 a level."""
    from kernels import acceptance, draft, fused, tree_attention

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype)

    for B, N, M, D in ((1, 60, 60, 128),                   # verification
                       (1, 10, 70, 64),                    # drafting
                       (1, 1, 1, 128),                     # one-token decoding
                       (128, 60, 60, 80)):                 # the reward's target forward: no split
        q, k, cache = empty(B, N, 32, D).transpose(1, 2), empty(B, M, 8, D).transpose(1, 2), empty(B, 8, 4096, D)
        length, mask = torch.zeros(B, dtype=torch.long), torch.ones(B, N, M, dtype=torch.bool)
        tree_attention.tree_attention_triton(q, k, k, mask, cache, cache, length, length if B > 1 else None)

    if dtype == torch.float32:                             # the rest computes in float32 whatever it is given
        return
    tokens, uniform = torch.zeros(1, 60, dtype=torch.long), torch.zeros(1, 60)
    acceptance.score_nodes_triton(empty(1, 60, 128_256))
    acceptance.score_nodes_triton(empty(2048, 60, 300))    # as many rows as a training step may have
    for temperature in 0.0, 0.7:
        acceptance.score_nodes_triton(empty(1, 60, 128_256), tokens, tokens, temperature, uniform)
    for k in 10, 1:
        acceptance.propose_triton(empty(1, k, 32_000), torch.arange(32_000), k, 1.0)
    for m, M in (1, 0), (10, 70):                          # the second level's frontier, and the last one's
        draft.frontier_triton(empty(1, 10 * m, dtype=torch.float32), torch.zeros(1, 10 * m, dtype=torch.long),
                              empty(1, m, 4096), torch.ones(1, m, M, dtype=torch.bool), 10)
    fused.use_triton = lambda x: True
    x, weight, head_weight = empty(1, 60, 4096), empty(4096), empty(128)
    fused.add_rms_norm(x, x, weight, 1e-5)
    fused.add_rms_norm(x, None, weight, 1e-5)
    fused.embed_norm_cat(tokens, empty(1000, 4096), weight, x, weight, 1e-5)
    for norms in None, (head_weight, head_weight, 32, 1e-5):
        fused.rotate(empty(1, 60, 48, 128)[:, :, :40], *empty(2, 1, 60, 64, dtype=torch.float32), norms)
    fused.silu_mul(empty(1, 60, 2 * 14336))


def main(sm):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch
    compiled = compile_only(sm)
    for dtype in torch.bfloat16, torch.float32:            # float16 is bfloat16's twin: as wide, the same instructions
        call_everything(torch, dtype)
    for name, kernel in compiled:
        print(json.dumps({"kernel": name, "shared": kernel.metadata.shared, "stack": stack(kernel.asm["cubin"])}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
