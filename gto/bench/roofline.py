"""How far a draft-verify cycle is from the hardware's limit, at real targets' shapes; random weights cost the same."""
import torch

from gto.engine import Engine
from gto.head import DraftHead, HeadConfig
from gto.model import ModelConfig, Target, cast, small_normal

SHAPES = {
    "llama-3.1-8b": ModelConfig(128256, 32, 4096, 32, 8, 128, 14336, 131072, 1e-5, 5e5, (8.0, 1.0, 4.0, 8192), False),
    "qwen3-8b": ModelConfig(151936, 36, 4096, 32, 8, 128, 12288, 40960, 1e-6, 1e6, tied=False, qk_norm=True), }


def milliseconds(run):
    """Median time of `run()` inside a CUDA graph: on the device alone, without the launches."""
    from triton.testing import do_bench_cudagraph
    return do_bench_cudagraph(run, return_mode="median")


@torch.no_grad()
def measure(target, head, context, shape, copy):
    """One row of the table, times in ms, with `context` tokens in the caches. copy: bytes/s that a copy reaches."""
    ar, speculative = (Engine(target, each, shape, capacity=context + 128) for each in (None, head))
    for engine in (ar, speculative):
        engine.length.fill_(context), engine.features.normal_()
    for cache in (ar.target_cache, speculative.target_cache, speculative.head_cache):
        cache.k.normal_(), cache.v.normal_()
    tree = speculative.draft()
    times = {"T_AR": milliseconds(ar.cycle), "T_draft": milliseconds(speculative.draft),
             "T_verify": milliseconds(lambda: speculative.verify(tree)), "T_cycle": milliseconds(speculative.cycle)}
    # A step reads the cache and every weight but the embedding's: of that one row, unless it is the output matrix too.
    weights = sum(p.nbytes for p in target.parameters()) - target.embed.weight.nbytes * (not target.config.tied)
    bandwidth = 1e3 * (weights + 2 * ar.target_cache.k[..., :context, :].nbytes) / times["T_AR"]
    return {"context": context, "tree": str(shape), **times, "AR_GB/s": bandwidth / 1e9, "AR_of_copy": bandwidth / copy,
            "efficiency": times["T_AR"] / times["T_cycle"]}


def report(name, shapes):
    """Measure one of SHAPES with these TreeShapes. -> {"rows", and what a copy reaches, read and written together}."""
    x, y = torch.randn(2, 1 << 29, device="cuda", dtype=torch.bfloat16)
    copy = 1e3 * 2 * x.nbytes / milliseconds(lambda: y.copy_(x))  # bytes/s
    config = SHAPES[name]
    head_config = HeadConfig(**{**vars(config), "layers": 1, "qk_norm": False, "rope_scaling": None},
                             target_dim=config.dim, draft_vocab_size=32000)
    with torch.device("cuda"):
        target = cast(small_normal(Target(config)), torch.bfloat16)
        head = cast(small_normal(DraftHead(head_config, target)), torch.bfloat16)
    rows = [measure(target, head, context, shape, copy) for context in (512, 2048, 8192) for shape in shapes]
    return {"rows": rows, "copy_GB/s": copy / 1e9}
