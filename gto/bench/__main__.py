"""The benchmark: plain decoding ("ar") and any number of heads and trees, side by side on the same prompts.

    python -m gto.bench                                        the two heads that train.py leaves in out
    python -m gto.bench --head eagle=PATH --head gto=PATH --tree 8,5,24 --temperature 0 1
    python -m gto.bench --target LLAMA --chat --head EAGLE3 --tree 10,8,59 \\
        --prompts mt_bench/question.jsonl --limit 0 --max-new-tokens 512         the protocol of EAGLE's tables
    python -m gto.bench --head gto=out/gto.pt --adaptive       also with the policy that python -m gto.ltd left for it
    python -m gto.bench --shape llama-3.1-8b                   how far a cycle is from the hardware's limit (GPU)
"""
import json
import time
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import mean, median

import torch

from gto.bench import roofline
from gto.checkpoint import load_encoding, load_head, load_target
from gto.data import read_prompts
from gto.engine import Engine, cut
from gto.evaluate import FixedText, speeds, tau_and_misalignment
from gto.rollout import target_forward
from gto.tokenizer import StreamDecoder, end_of_text_id
from gto.tree import TreeShape
from gto.util import UserError, argument_parser, main_guard, one_thread_on_cpu, ranks, start, synchronize, table
from gto.verify import Sampling


def parse_arguments(argv):
    parser = argument_parser("python -m gto.bench", __doc__)
    parser.add_argument("--out-dir", default="out", help="where train.py left what is not named (default: out)")
    parser.add_argument("--target", help="checkpoint or folder (default: target.pt in --out-dir)")
    parser.add_argument("--head", action="append", metavar="[NAME=]PATH",
                        help="repeatable (default: control.pt and gto.pt in --out-dir)")
    parser.add_argument("--tree", action="append", type=TreeShape.parse, metavar="K,D,G", help="children,depth,nodes;"
                        " repeatable: each head with each (default: 2,4,8 and 8,5,24)")
    parser.add_argument("--adaptive", action="store_true", help="run each head also with its policy, policy-<file>")
    parser.add_argument("--tokenizer", help="default: the one in the target's folder")
    parser.add_argument("--prompts", help="a question.jsonl (default: the held-out prompts in --out-dir)")
    parser.add_argument("--limit", type=int, default=16, help="questions; 0: all of them (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="per answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--chat", action="store_true", help="apply the tokenizer's chat template")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=roofline.SHAPES, help="measure this shape with random weights")
    arguments = parser.parse_args(argv)
    if arguments.max_new_tokens < 2 or arguments.limit < 0:
        raise UserError("--max-new-tokens must be at least 2, --limit at least 0 (0: all)")
    return arguments


def load(arguments):
    """What the flags name, on a GPU in bfloat16, on a CPU in float32. -> target, {method: function of sampling and
    capacity -> Engine}, encoding, questions [[turn, ...]]."""
    out, dtype = Path(arguments.out_dir), torch.float32 if arguments.device == "cpu" else torch.bfloat16
    path = Path(arguments.target or out / "target.pt")
    target = load_target(path, arguments.device, dtype, ranks="split" if ranks() > 1 else None)
    encoding = load_encoding(arguments.tokenizer or path)
    methods = {"ar": partial(Engine, target, None)}
    for text in arguments.head or (f"control={out}/control.pt", f"gto={out}/gto.pt"):
        name, _, file = text.partition("=")
        head = load_head(file or name, target, dtype)
        for tree in arguments.tree or (TreeShape(2, 4, 8), TreeShape(8, 5, 24)):
            methods[f"{name}, tree {tree}"] = partial(Engine, target, head, tree)
        if arguments.adaptive:
            from gto.ltd.engine import AdaptiveEngine
            from gto.ltd.policy import load_policy, policy_path
            methods[f"{name}, adaptive"] = partial(AdaptiveEngine, target, head, load_policy(policy_path(file or name)))
    return target, methods, encoding, read_prompts(arguments.prompts or out / "prompts.jsonl", arguments.limit or None)


def conversation(texts, encoding, template=None):
    """Token ids of questions and answers in turn, up to the next answer. Without a template text follows text."""
    if template is None:
        return encoding.encode_ordinary("".join(texts))
    from gto.released import chat
    messages = [{"role": role, "content": text} for role, text in zip(cycle(("user", "assistant")), texts)]
    return chat.encode(template, messages, encoding)[0]


def answer_everything(methods, questions, new_tokens, stop, encoding, template=None):
    """Every method on every turn: first all first turns, then the second ones with ar's answers in their history, so
    that the prompts are the same for all.

    methods {name: function of a capacity -> Engine}; questions [[turn, ...]]. Returns the prompts [ids] and, in the
    same order, {name: [Decoded]}. UserError if a conversation is too long for the target."""
    prompts, results, history = [], {name: [] for name in methods}, [[] for _ in questions]
    for turn in range(max(map(len, questions))):
        asked = [(turns[turn], texts) for turns, texts in zip(questions, history) if turn < len(turns)]
        new = [conversation([*texts, question], encoding, template) for question, texts in asked]
        room = max(map(len, new)) + new_tokens
        engines = {name: make(capacity=room) for name, make in methods.items()}
        if room > (most := engines["ar"].target.config.max_len):
            raise UserError(f"a conversation may take {room} tokens, the target's context holds {most}: lower"
                            " --max-new-tokens, or leave long questions out")
        for name, decoded in speeds(engines, new, new_tokens, stop, desc=f"turn {turn + 1}").items():
            results[name] += decoded
        for (question, texts), decoded in zip(asked, results["ar"][len(prompts):]):
            answer = [token for token in cut(decoded.tokens[:new_tokens], stop) if token not in stop]
            texts += [question, StreamDecoder(encoding).push(answer)]
        prompts += new
    return prompts, results


@torch.inference_mode()
def halves(engine, prompt, cycles=20):
    """How long drafting and verifying take: median ms over the first cycles behind a prompt."""
    def clock():
        synchronize(engine.device)
        return 1e3 * time.perf_counter()

    times = []
    engine.prefill([prompt])
    for _ in range(cycles):
        began = clock()
        tree = engine.run("draft", engine.draft)
        drafted = clock()
        engine.run("verify", partial(engine.verify, tree))
        times.append((drafted - began, clock() - drafted))
    return dict(zip(("draft_ms", "verify_ms"), map(median, zip(*times))))


def summary(mine, ar):
    """One method's [Decoded] next to plain decoding's -> a row. tau is over all cycles; tokens/s and speed-up are
    medians over answers, the speed-up's paired by prompt."""
    pairs = [(a, b) for a, b in zip(mine, ar) if a.cycles and b.cycles]
    if not pairs:
        raise UserError("every answer ended with its first token: nothing to measure; choose other prompts")
    cycles = sum(a.cycles for a, _ in pairs)
    return {"answers": len(pairs), "tau": sum(len(a.tokens) - 1 for a, _ in pairs) / cycles,
            "tokens_per_s": median(a.tokens_per_second for a, _ in pairs),
            "speedup": median(a.tokens_per_second / b.tokens_per_second for a, b in pairs),
            "cycle_ms": 1e3 * sum(a.seconds for a, _ in pairs) / cycles}


def misalignment(engine, prompts, answers):
    """The paper's diagnosis, `evaluate.tau_and_misalignment`, along ar's answers. -> {pruned, matched}, their means.
    Left out are cycles whose tree could reach beyond the end, hence answers no longer than a tree is deep."""
    shares = []
    for prompt, answer in zip(prompts, answers):
        if len(answer) > engine.shape.depth:      # one text at a time: the logits of all would not fit
            text = target_forward(engine.target, torch.tensor([prompt + answer], device=engine.device))
            start = torch.tensor([len(prompt)], device=engine.device)
            fixed = FixedText(text, start, start + len(answer) - engine.shape.depth)
            shares.append(tau_and_misalignment(engine.head, fixed, engine.shape, engine.score_temp)[1:])
    return dict(zip(("pruned", "matched"), map(mean, zip(*shares))))


@torch.no_grad()
def divergences(target, prompts, mine, ar):
    """Where greedy answers leave plain decoding's, with the gap of the target's top two logits there: a gap within
    rounding is a near tie, anything more is an error. Exact arithmetic has none."""
    found = []
    for number, (prompt, a, b) in enumerate(zip(prompts, mine, ar), 1):
        if a != b:
            at = next(i for i, pair in enumerate(zip(a, b)) if pair[0] != pair[1])
            hidden, *_ = target(torch.tensor([prompt + b[:at]], device=target.norm.weight.device))
            best, second = target.logits(hidden[0, -1]).float().topk(2).values.tolist()
            found.append({"answer": number, "token": at, "gap": best - second})
    return found


def benchmark(target, methods, encoding, questions, arguments):
    """What `load` returns -> {"rows": one by temperature and method, "divergences"}."""
    template, stop = None, {end_of_text_id(encoding)}
    if arguments.chat:
        from gto.released import chat
        template = chat.guess_template(encoding)
        stop = chat.stop_ids(template, encoding)
    rows, apart, new_tokens = [], [], arguments.max_new_tokens
    for T in arguments.temperature:
        torch.manual_seed(arguments.seed)
        makers = {name: partial(make, sampling=Sampling(T)) for name, make in methods.items()}
        prompts, results = answer_everything(makers, questions, new_tokens, stop, encoding, template)
        answers = {name: [cut(each.tokens[:new_tokens], stop) for each in runs] for name, runs in results.items()}
        for name, make in makers.items():
            row = {"T": f"{T:g}", "method": name, **summary(results[name], results["ar"])}
            if make.func is Engine:                               # an adaptive cycle has no halves of fixed shapes
                engine = make(capacity=len(prompts[0]) + new_tokens)
                row |= halves(engine, prompts[0])
                row |= misalignment(engine, prompts, answers["ar"]) if engine.head else {}
            if T == 0:
                found = divergences(target, prompts, answers[name], answers["ar"])
                row["equal"] = len(prompts) - len(found)
                apart += [{"method": name, **place} for place in found]
            rows.append(row)
    return {"rows": rows, "divergences": apart}


def main(argv=None):
    arguments = parse_arguments(argv)
    start("cuda" if arguments.shape else arguments.device)
    if arguments.shape:
        report = roofline.report(arguments.shape, arguments.tree or (TreeShape(10, 8, 59), TreeShape(1, 7, 7)))
    else:
        one_thread_on_cpu(arguments.device)
        report = benchmark(*load(arguments), arguments)
    print(table(report["rows"]))
    if report.get("divergences"):
        print("\nGreedy answers that are not ar's:\n\n" + table(report["divergences"]))
    device = "CPU" if arguments.device == "cpu" else torch.cuda.get_device_name(arguments.device)
    print(json.dumps({"device": device, "torch": torch.__version__, "flags": vars(arguments), **report}, default=str))


if __name__ == "__main__":
    main_guard(main)
