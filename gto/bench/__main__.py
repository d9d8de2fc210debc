"""The benchmark: plain decoding ("ar") and any number of heads and trees, side by side on the same prompts.

    python -m gto.bench                             the two heads that train.py leaves in out
    python -m gto.bench --shape llama-3.1-8b        how far a cycle is from the hardware's limit (GPU)"""
import json
from functools import partial
from statistics import median

import torch

from gto.checkpoint import load_head, load_run
from gto.data import read_prompts
from gto.engine import Engine, cut
from gto.evaluate import speeds
from gto.head import DraftHead, HeadConfig
from gto.model import ModelConfig, Target, cast, small_normal
from gto.page import watch, write_page
from gto.policy import make_engine
from gto.tree import TreeShape
from gto.util import FLAGS, UserError, argument_parser, at_least, main_guard, start, table
from gto.verify import Sampling

SHAPES = {
    "llama-3.1-8b": ModelConfig(128256, 32, 4096, 32, 8, 128, 14336, 131072, 1e-5, 5e5, (8.0, 1.0, 4.0, 8192), False),
    "qwen3-8b": ModelConfig(151936, 36, 4096, 32, 8, 128, 12288, 40960, 1e-6, 1e6, tied=False, qk_norm=True), }


def load_methods(arguments, out, target):
    """The heads, policies and trees that the flags name. -> {method: function of sampling and capacity -> Engine}"""
    methods = {"ar": partial(Engine, target, None)}
    ways = (arguments.policy or []) + (arguments.tree or []) or ["rule", TreeShape(8, 5, 24)]
    for text in arguments.head or (f"control={out}/control.pt", f"gto={out}/gto.pt"):
        name, _, file = text.rpartition("=")
        head = load_head(file, target, target.norm.weight.dtype)
        for way in ways:
            if (method := f"{name or file}, {way}") in methods:
                raise UserError(f"--head {method} is there twice: write NAME=PATH")
            methods[method] = partial(make_engine, target, head, way, file, out)
    return methods


def summary(mine, ar):
    """One method's [Decoded] next to plain decoding's -> a row."""
    pairs = [(a, b) for a, b in zip(mine, ar) if a.cycles and b.cycles]
    if not pairs:
        raise UserError("every answer ended with its first token: nothing to measure; choose other prompts")
    cycles = sum(a.cycles for a, _ in pairs)
    return {"answers": len(pairs), "tau": sum(len(a.tokens) - 1 for a, _ in pairs) / cycles,
            "tokens_per_s": median(a.tokens_per_second for a, _ in pairs),
            "speedup": median(a.tokens_per_second / b.tokens_per_second for a, b in pairs),
            "cycle_ms": 1e3 * sum(a.seconds for a, _ in pairs) / cycles}


def benchmark(arguments):
    """-> {"rows": of the table, one by temperature and method}."""
    out, target, encoding, encode, stop = load_run(arguments)
    methods = load_methods(arguments, out, target)
    questions = read_prompts(arguments.prompts or out / "prompts.jsonl", arguments.limit or None)
    rows, new_tokens, prompts = [], arguments.max_new_tokens, [encode(turns[:1]) for turns in questions]
    if (room := max(map(len, prompts)) + new_tokens) > target.config.max_len:
        raise UserError(f"{room} tokens, but the context holds {target.config.max_len}: lower --max-new-tokens")
    for T in arguments.temperature:
        torch.manual_seed(arguments.seed)
        engines = {name: make(sampling=Sampling(T), capacity=room) for name, make in methods.items()}
        results = speeds(engines, prompts, new_tokens, stop, desc=f"T={T:g}")
        for name in methods:
            answers = ([cut(each.tokens[:new_tokens], stop) for each in results[way]] for way in (name, "ar"))
            equal = f"{sum(map(list.__eq__, *answers))} of {len(prompts)}"            # the seed's text, at any T
            rows.append({"T": f"{T:g}", "method": name, **summary(results[name], results["ar"]), "equal": equal})
    if arguments.report:
        decode = watch(engines[name], prompts[0], encoding, new_tokens, stop)
        write_page(arguments.report, f"Side by side, and a decode by {name}", decode, rows=rows)
    return {"rows": rows}


def milliseconds(run):
    """Median time of `run()` inside a CUDA graph: on the device alone, without the launches."""
    from triton.testing import do_bench_cudagraph
    return do_bench_cudagraph(run, return_mode="median")


@torch.no_grad()
def roofline_row(target, head, context, shape, copy):
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


def roofline(name, shapes):
    """Measure one of SHAPES with these TreeShapes. -> {"rows", and what a copy reaches, read and written together}."""
    x, y = torch.randn(2, 1 << 29, device="cuda", dtype=torch.bfloat16)
    copy = 1e3 * 2 * x.nbytes / milliseconds(lambda: y.copy_(x))  # bytes/s
    config = SHAPES[name]
    head_config = HeadConfig(**{**vars(config), "layers": 1, "qk_norm": False, "rope_scaling": None},
                             target_dim=config.dim, draft_vocab_size=32000)
    with torch.device("cuda"):
        target = cast(small_normal(Target(config)), torch.bfloat16)
        head = cast(small_normal(DraftHead(head_config, target)), torch.bfloat16)
    rows = [roofline_row(target, head, context, shape, copy) for context in (512, 2048, 8192) for shape in shapes]
    return {"rows": rows, "copy_GB/s": copy / 1e9}


def main(argv=None):
    parser = argument_parser("python -m gto.bench", __doc__, *FLAGS)
    parser.add_argument("--head", action="append", metavar="[NAME=]PATH", help="repeatable; default: control and gto")
    parser.add_argument("--policy", action="append", choices=("rule", "ltd"), help="repeatable; see decode.py")
    parser.add_argument("--tree", action="append", type=TreeShape.parse, help="repeatable; default: rule and 8,5,24")
    parser.add_argument("--prompts", help="a question.jsonl (default: the held-out prompts in --out-dir)")
    parser.add_argument("--limit", type=at_least(0), default=16, help="questions; 0: all of them (default: 16)")
    parser.add_argument("--max-new-tokens", type=at_least(2), default=128, help="per answer (default: 128)")
    parser.add_argument("--temperature", type=at_least(0, float), nargs="+", default=[0.0, 1.0])
    parser.add_argument("--shape", choices=SHAPES, help="measure this shape with random weights")
    arguments = parser.parse_args(argv)
    start("cuda" if arguments.shape and arguments.device == "cpu" else arguments.device)
    if arguments.shape:
        report = roofline(arguments.shape, arguments.tree or (TreeShape(10, 8, 59), TreeShape(1, 7, 7)))
    else:
        report = benchmark(arguments)
    print(table(report["rows"]))
    device = "CPU" if arguments.device == "cpu" else torch.cuda.get_device_name(arguments.device)
    print(json.dumps({"device": device, "torch": torch.__version__, "flags": vars(arguments), **report}, default=str))


if __name__ == "__main__":
    main_guard(main)
