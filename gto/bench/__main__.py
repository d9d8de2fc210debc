"""The benchmark: plain decoding ("ar") and any number of heads and trees, side by side on the same prompts:
python -m gto.bench takes the two heads that train.py leaves in out. See README.md."""
import json
from functools import partial
from statistics import median

import torch

from gto.checkpoint import load_head, load_run, main_head
from gto.data import read_prompts
from gto.engine import Engine, cut
from gto.evaluate import overall, speeds
from gto.page import watch, write_page
from gto.policy import make_engine
from gto.tree import TreeShape
from gto.util import FLAGS, UserError, argument_parser, at_least, main_guard, one_thread_if_small, start, table
from gto.verify import Sampling


def load_methods(arguments, out, target):
    """The heads, policies and trees that the flags name. -> {method: function of sampling and capacity -> Engine}"""
    methods = {"ar": partial(Engine, target, None)}
    ways = (arguments.policy or []) + (arguments.tree or []) or ["rule", TreeShape(8, 5, 24)]
    for text in arguments.head or (f"control={out}/control.pt", f"{(main := main_head(out)).stem}={main}"):
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
            "in_all": overall([a for a, _ in pairs]) / overall([b for _, b in pairs]),
            "cycle_ms": 1e3 * sum(a.seconds for a, _ in pairs) / cycles}


def benchmark(arguments):
    """-> {"rows": of the table, one by temperature and method}."""
    out, target, encoding, encode, stop = load_run(arguments)
    one_thread_if_small(target)
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


def main(argv=None):
    parser = argument_parser("python -m gto.bench", __doc__, *FLAGS)
    parser.add_argument("--head", action="append", metavar="[NAME=]PATH", help="default: control and decode.py's")
    parser.add_argument("--policy", action="append", choices=("rule", "ltd"), help="repeatable; see decode.py")
    parser.add_argument("--tree", action="append", type=TreeShape.parse, help="repeatable; default: rule and 8,5,24")
    parser.add_argument("--prompts", help="a question.jsonl (default: the held-out prompts in --out-dir)")
    parser.add_argument("--limit", type=at_least(0), default=16, help="questions; 0: all of them (default: 16)")
    parser.add_argument("--max-new-tokens", type=at_least(2), default=128, help="per answer (default: 128)")
    parser.add_argument("--temperature", type=at_least(0, float), nargs="+", default=[0.0, 1.0])
    arguments = parser.parse_args(argv)
    start(arguments.device)
    report = benchmark(arguments)
    print(table(report["rows"]))
    device = "CPU" if arguments.device == "cpu" else torch.cuda.get_device_name(arguments.device)
    print(json.dumps({"device": device, "torch": torch.__version__, "flags": vars(arguments), **report}, default=str))


if __name__ == "__main__":
    main_guard(main)
