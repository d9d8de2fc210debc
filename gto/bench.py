"""The benchmark: plain decoding and any number of heads and trees, side by side on the same prompts.

    python -m gto.bench                                        the two heads train.py leaves in out
    python -m gto.bench --head eagle=PATH --head gto=PATH --tree 8,5,24 --temperature 0 1
    python -m gto.bench --target LLAMA --tokenizer LLAMA --chat --head EAGLE3 --tree 10,8,59 \\
        --prompts mt_bench/question.jsonl --limit 0 --max-new-tokens 512         the protocol of EAGLE's tables
    torchrun --nproc_per_node=2 -m gto.bench --target ...      a target split over two GPUs
    python -m gto.bench --adaptive                             each head also with its policy from train.py --stage ltd
    python -m gto.bench --shape llama-3.1-8b                   how far a cycle is from the hardware's limit (GPU)

All methods run in the same engine, prompt by prompt in turn, after one prompt of warm-up, batch 1, prefill left out.
tau counts the token that the target adds itself; a last cycle that overshoots counts in full, in tokens and in time.
The second turn of a question has plain decoding's first answer in its history, so prompts are the same for all.
"""
import json
from functools import partial
from itertools import zip_longest
from pathlib import Path

import gto  # noqa: F401  before torch: it sets the thread environment
import torch
from tqdm import tqdm

from gto import chat, parallel, plot, roofline
from gto.adaptive import AdaptiveEngine
from gto.data import read_prompts, write_text
from gto.diagnose import dissect
from gto.engine import Engine, cut, one_thread_on_cpu
from gto.errors import UserError, argument_parser, main_guard
from gto.evaluate import timed
from gto.load import load_head, load_target
from gto.policy import beside, load_policy
from gto.summary import mean, summary, tables
from gto.tokenizer import StreamDecoder, end_of_text_id, load_encoding
from gto.tree import TreeShape
from gto.verify import Sampling

HEADS = ("control=out/control.pt", "gto=out/gto.pt")
TREES = ("2,4,8", "8,5,24")


def parse_arguments(argv):
    parser = argument_parser("python -m gto.bench", __doc__)
    parser.add_argument("--target", default="out/target.pt", help="checkpoint or folder (default: %(default)s)")
    parser.add_argument("--head", action="append", metavar="[NAME=]PATH",
                        help=f"repeatable (default: {' '.join(HEADS)})")
    parser.add_argument("--tree", action="append", metavar="K,D,G", help="children,levels,nodes; repeatable, each head"
                        f" is run with each (default: {' '.join(TREES)})")
    parser.add_argument("--adaptive", action="store_true", help="run each head also with its policy, policy-<file>")
    parser.add_argument("--tokenizer", default="data/stdlib", help="see gto/tokenizer.py for what can be named")
    parser.add_argument("--prompts", help="a question.jsonl; default: the held-out prompts beside the tokenizer")
    parser.add_argument("--limit", type=int, default=16, help="questions; 0: all of them (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="per answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--chat", action="store_true", help="apply the tokenizer's chat template")
    parser.add_argument("--system", help="with --chat: the system message")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--json", metavar="FILE", help="write the last line there, too")
    parser.add_argument("--plot", metavar="FILE", help="draw the accepted drafts and the split of a cycle")
    parser.add_argument("--shape", help=f"measure this shape with random weights: {', '.join(roofline.SHAPES)}")
    arguments = parser.parse_args(argv)
    if arguments.max_new_tokens < 2 or arguments.limit < 0:
        raise UserError("--max-new-tokens must be at least 2, --limit at least 0 (0: all)")
    if arguments.system is not None and not arguments.chat:
        raise UserError("--system is part of a chat template: add --chat, or leave it out")
    for path in map(Path, filter(None, (arguments.json, arguments.plot))):
        if path.is_dir() or not path.resolve().parent.is_dir():
            raise UserError(f"cannot write {path}: it is a folder, or is in one that does not exist")
    if arguments.plot:
        plot.check(arguments.plot)
    return arguments


def named_paths(texts):
    """['gto=out/gto.pt', 'out/head.pt'] -> {'gto': 'out/gto.pt', 'head': 'out/head.pt'}."""
    paths = {}
    for text in texts:
        name, _, path = text.partition("=") if "=" in text else (Path(text).stem, "", text)
        if not name or not path or name in paths or name == "plain":
            raise UserError(f"--head {text}: give each head a path and a name of its own, NAME=PATH; plain is taken")
        paths[name] = path
    return paths


# Prompts ----------------------------------------------------------------------------------------------------------

def conversation(turns, answers, encoding, template=None, system=None):
    """Token ids up to the next answer: `turns` of the user, one more than `answers`, lists of ids.

    Without a template text follows text, for models that were not trained on chats.
    """
    if template is None:
        parts = zip_longest(map(encoding.encode_ordinary, turns), answers, fillvalue=[])
        return [token for turn, answer in parts for token in [*turn, *answer]]
    messages = [{"role": "system", "content": system}] if system else []
    for turn, answer in zip_longest(turns, answers):
        messages.append({"role": "user", "content": turn})
        if answer is not None:
            messages.append({"role": "assistant", "content": StreamDecoder(encoding).push(answer)})
    return chat.encode(template, messages, encoding)[0]


def longest(questions, new_tokens, render, max_len):
    """Tokens the longest conversation may take, last answer included. UserError if the target's context holds less.

    An earlier answer counts twice: read back from text, it may have more tokens than were written.
    """
    most = max(len(render(turns, [[]] * (len(turns) - 1))) + (2 * len(turns) - 1) * new_tokens for turns in questions)
    if most > max_len:
        raise UserError(f"the longest conversation may take {most} tokens, the target's context holds {max_len}: lower "
                        "--max-new-tokens, or leave long questions out")
    return most


# Measurement ------------------------------------------------------------------------------------------------------

def run(engines, questions, render, room, new_tokens, stop, bar):
    """Every method on every turn: {method: [result by turn]}. room: see `longest`; a result: see `measure`."""
    warm_up = render(questions[0][:1], [])
    results = {name: [] for name in engines}
    for engine in engines.values():
        measure(engine, warm_up, new_tokens, stop)
        bar.update()
    for number, turns in enumerate(questions):
        answers = []
        for turn in range(len(turns)):
            prompt = render(turns[:turn + 1], answers)
            if len(prompt) + new_tokens > room:
                raise UserError(f"question {number + 1}: the answer to turn {turn} has too many tokens when it is read "
                                "back: leave this question out")
            for name, engine in engines.items():
                result = measure(engine, prompt, new_tokens, stop)
                results[name].append({"question": number, "turn": turn, "prompt": prompt, **result})
                bar.update()
            answer = results["plain"][-1]["answer"]
            answers.append(answer[:-1] if answer[-1] in stop else answer)
    return results


def measure(engine, prompt, new_tokens, stop):
    """One prompt twice: at full speed, and dissected."""
    seconds, tokens, accepted = timed(engine, prompt, new_tokens, stop)
    return {"seconds": seconds, "emitted": len(tokens) - 1, "accepted": accepted,
            "answer": cut(tokens[:new_tokens], stop), "inside": dissect(engine, prompt, new_tokens, stop)}


@torch.no_grad()
def divergences(target, results, plain):
    """Where greedy answers leave plain decoding's, each with the gap of the target's top two logits there: a gap
    within rounding is a near tie, anything more is an error. Exact arithmetic has none."""
    found = []
    for mine, other in zip(results, plain):
        a, b = mine["answer"], other["answer"]
        if a != b:
            at = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
            hidden = target(torch.tensor([mine["prompt"] + b[:at]], device=target.norm.weight.device))[0]
            top = target.logits(hidden[:, -1]).float().topk(2).values[0]
            found.append({"question": mine["question"], "turn": mine["turn"], "position": at, "plain": b[at],
                          "here": a[at], "gap": (top[0] - top[1]).item()})
    return found


def benchmark(target, heads, trees, policies, encoding, questions, arguments):
    """heads {name: DraftHead}, trees [TreeShape], policies {head name: policy}, questions [[turn, ...]] -> the report,
    ready for JSON."""
    template = chat.guess_template(encoding) if arguments.chat else None
    stop = chat.stop_ids(template, encoding) if template else {end_of_text_id(encoding)}
    new_tokens = arguments.max_new_tokens

    def render(turns, answers):
        return conversation(turns, answers, encoding, template, arguments.system)

    room = longest(questions, new_tokens, render, target.config.max_len)
    levels = max(shape.levels for shape in [*trees, *(policy.space.shape for policy in policies.values())])
    capacity = room + 3 * levels + 2                                                  # `dissect` goes a little beyond

    methods = {"plain": partial(Engine, target, None, None)}
    methods |= {f"{name}, tree {tree}": partial(Engine, target, head, tree)
                for name, head in heads.items() for tree in trees}
    methods |= {f"{name}, adaptive": partial(AdaptiveEngine, target, heads[name], policy)
                for name, policy in policies.items()}
    device, temperatures = target.norm.weight.device, list(dict.fromkeys(arguments.temperature))
    report = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
              "torch": torch.__version__, "dtype": str(target.norm.weight.dtype).removeprefix("torch."),
              "questions": len(questions), "answers": sum(map(len, questions)), "max_new_tokens": new_tokens,
              "chat": template, "seed": arguments.seed, "rows": [], "divergences": []}
    with tqdm(total=len(temperatures) * len(methods) * (report["answers"] + 1), desc="bench", unit="run",
              disable=parallel.rank() > 0) as bar:
        for temperature in temperatures:
            torch.manual_seed(arguments.seed)
            engines = {name: make(sampling=Sampling(temperature), capacity=capacity)
                       for name, make in methods.items()}
            results = run(engines, questions, render, room, new_tokens, stop, bar)
            for name, engine in engines.items():
                row = {"T": temperature, "method": name,
                       **summary(results[name], results["plain"], engine.shape.levels if engine.head else 0)}
                if temperature == 0:
                    different = divergences(target, results[name], results["plain"])
                    row["equal"] = report["answers"] - len(different)
                    report["divergences"] += [{"method": name, **place} for place in different]
                report["rows"].append(row)
            if temperature == 0:
                report["distinct_tokens"] = mean([len(set(r["answer"])) for r in results["plain"]])
    return report


def check_device(name):
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def load(arguments):
    """What `benchmark` takes, from the command line."""
    trees = [TreeShape.parse(text) for text in dict.fromkeys(arguments.tree or TREES)]
    paths = named_paths(arguments.head or HEADS)
    for temperature in arguments.temperature:
        Sampling(temperature)                                     # refuses a negative one
    check_device(arguments.device)
    encoding = load_encoding(arguments.tokenizer)
    questions = read_prompts(arguments.prompts or Path(arguments.tokenizer) / "prompts.jsonl", arguments.limit or None)
    on_gpu = torch.device(arguments.device).type == "cuda"
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if on_gpu else "float32"))
    target = load_target(arguments.target, arguments.device, dtype, ranks="split" if parallel.ranks() > 1 else None)
    if encoding.n_vocab > target.config.vocab_size:
        raise UserError(f"the tokenizer has {encoding.n_vocab} tokens, target {target.config.vocab_size}: they do not "
                        "belong together; choose another --tokenizer")
    heads = {name: load_head(path, target, dtype).requires_grad_(False) for name, path in paths.items()}
    policies = {name: load_policy(beside(path)) for name, path in
                (paths.items() if arguments.adaptive else ())}
    return target, heads, trees, policies, encoding, questions


def shape_report(arguments):
    if arguments.shape not in roofline.SHAPES:
        raise UserError(f"no shape '{arguments.shape}': choose one of {', '.join(roofline.SHAPES)}")
    if not torch.cuda.is_available():
        raise UserError("--shape measures a GPU and there is none here: run it on a machine with CUDA")
    if arguments.plot:
        raise UserError("--plot draws the comparison of heads: leave it out with --shape")
    trees = {"trees": arguments.tree} if arguments.tree else {}
    return {"shape": arguments.shape, "device": torch.cuda.get_device_name(), "torch": torch.__version__,
            "rows": roofline.table(arguments.shape, **trees)}


def main(argv=None):
    arguments = parse_arguments(argv)
    parallel.start(arguments.device)
    one_thread_on_cpu(arguments.device)
    if arguments.shape:
        report = shape_report(arguments)
    else:
        report = benchmark(*load(arguments), arguments)
        print(tables(report))
        if arguments.plot and parallel.rank() == 0:
            plot.draw(report, arguments.plot)
    line = json.dumps(report)
    if arguments.json and parallel.rank() == 0:
        write_text(arguments.json, line + "\n")
    print(line)


if __name__ == "__main__":
    main_guard(main)
