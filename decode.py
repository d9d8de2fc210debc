"""Generate text by speculative decoding with a draft tree.

    python decode.py --prompt "def fibonacci(n):"
    python decode.py --prompt "import os" --temperature 1 --tree 4,4,12
    python decode.py --prompt "class Queue:" --compare       the same by plain decoding: equal? how much faster?
    python decode.py --prompt "class Queue:" --show-tree     draw the first draft
    python decode.py --prompt "class Queue:" --adaptive      depth and size chosen anew in every cycle
    python decode.py --target Llama-3.1-8B-Instruct --head EAGLE3-head --chat --tree 10,8,59 --prompt "Who are you?"
    torchrun --nproc_per_node=2 decode.py --target Llama-3.3-70B-Instruct ...      the target split over two GPUs

On a terminal, drafted tokens that the target accepted are green, tokens that the target added itself plain.
"""
import json
import sys
import time
from pathlib import Path

import gto  # noqa: F401  before torch: it sets the thread environment
import torch

from gto import chat, parallel
from gto.adaptive import AdaptiveEngine
from gto.engine import Engine, one_thread_on_cpu
from gto.errors import UserError, argument_parser, main_guard
from gto.evaluate import synchronize
from gto.load import load_head, load_target
from gto.model import cast
from gto.policy import beside, load_policy
from gto.show import show_tree
from gto.tokenizer import StreamDecoder, end_of_text_id, load_encoding
from gto.tree import TreeShape
from gto.verify import Sampling


def parse_arguments():
    parser = argument_parser("python decode.py", __doc__)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--method", choices=("ar", "draft", "control", "gto"), default="gto",
                        help="ar: plain decoding; else the head train.py left under this name (default: gto)")
    parser.add_argument("--out-dir", default="out", help="where train.py left them (default: out)")
    parser.add_argument("--target", help="instead: a target checkpoint, or a folder of Meta's or Hugging Face's files")
    parser.add_argument("--head", help="instead: a head checkpoint, or a folder with an EAGLE-3 head")
    parser.add_argument("--tokenizer", help="default: the target's folder; data/stdlib for a target trained here")
    parser.add_argument("--chat", action="store_true", help="the prompt is a question to a chat model")
    parser.add_argument("--tree", help="children,levels,nodes; 1,n,n is a chain (default: 2,4,8, on a GPU"
                        " 10,7,60)")
    parser.add_argument("--adaptive", nargs="?", const="", metavar="POLICY", help="let a policy choose depth and size;"
                        " default: the one that python train.py --stage ltd left for the head")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="decode plainly too, and compare")
    parser.add_argument("--show-tree", action="store_true", help="draw the draft tree of the first cycle")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object with all results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    arguments.target = arguments.target or f"{arguments.out_dir}/target.pt"
    arguments.head = arguments.head or f"{arguments.out_dir}/{arguments.method}.pt"
    if arguments.method == "ar" and (arguments.adaptive is not None or arguments.compare or arguments.show_tree):
        raise UserError("--method ar drafts nothing: leave out --adaptive, --compare and --show-tree")
    return arguments


def read_prompt(arguments):
    """Returns the prompt's token ids, the ids that end a text, and the encoding."""
    encoding = load_encoding(arguments.tokenizer or
                             (arguments.target if Path(arguments.target).is_dir() else "data/stdlib"))
    if arguments.chat:
        template = chat.guess_template(encoding)
        ids, _ = chat.encode(template, [{"role": "user", "content": arguments.prompt}], encoding)
        return ids, chat.stop_ids(template, encoding), encoding
    return encoding.encode_ordinary(arguments.prompt), {end_of_text_id(encoding)}, encoding


def decode(engine, encoding, prompt, max_new_tokens, stop, show=None):
    """Returns the new tokens, the tokens that each cycle emitted and the seconds after prefill. show: a text to print
    before them (once the prompt has proved to be fit); None: print nothing."""
    decoder, tokens, cycles, began = StreamDecoder(encoding), [], [], None
    for (new,) in engine.generate([prompt], max_new_tokens, stop):
        if began is None:
            synchronize(engine.device)
            began = time.perf_counter()
            print(show or "", end="", flush=True)
        else:
            cycles.append(len(new))
        tokens += new
        if show is not None:
            green, plain = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("", "")
            accepted, added = decoder.push(new[:-1]), decoder.push(new[-1:])
            print(f"{green}{accepted}{plain}{added}", end="", flush=True)
    return tokens, cycles, time.perf_counter() - began


def main():
    arguments = parse_arguments()
    if arguments.max_new_tokens < 1:
        raise UserError("--max-new-tokens must be at least 1")
    torch.manual_seed(arguments.seed)
    one_thread_on_cpu(arguments.device)
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    shape = TreeShape.parse(arguments.tree) if arguments.tree else TreeShape.default(arguments.device)
    if not arguments.prompt:
        raise UserError("the prompt is empty: give some text to continue, --prompt \"def fibonacci(n):\"")
    parallel.start(arguments.device)
    target = load_target(arguments.target, arguments.device, ranks="split" if parallel.ranks() > 1 else None)
    head = load_head(arguments.head, target) if arguments.method != "ar" else None
    for model in filter(None, (target, head) if arguments.device == "cuda" else ()):
        cast(model, torch.bfloat16)
    prompt, stop, encoding = read_prompt(arguments)
    capacity = min(len(prompt) + arguments.max_new_tokens, target.config.max_len)

    if arguments.adaptive is None:
        engine = Engine(target, head, shape, sampling, capacity=capacity)
    else:
        path = arguments.adaptive or beside(arguments.head)
        engine = AdaptiveEngine(target, head, load_policy(path, arguments.tree and shape), sampling, capacity)
    tokens, cycles, seconds = decode(engine, encoding, prompt, arguments.max_new_tokens, stop,
                                     show="" if arguments.chat else arguments.prompt)
    rate, tau = (len(tokens) - 1) / max(seconds, 1e-9), (len(tokens) - 1) / max(len(cycles), 1)
    result = {"text": encoding.decode(tokens), "token_ids": tokens, "acceptance_lengths": cycles, "tau": tau,
              "tokens_per_second": rate}
    figures = sys.stderr if parallel.rank() == 0 else sys.stdout                      # which is silent on the others
    print(f"\n\n{len(tokens)} tokens in {len(cycles)} cycles, {tau:.2f} a cycle (tau), {rate:.0f} tokens/s", file=figures)
    if arguments.compare:
        torch.manual_seed(arguments.seed)
        plain, _, seconds = decode(Engine(target, None, None, sampling, capacity=capacity), encoding, prompt,
                                   arguments.max_new_tokens, stop)
        plain_rate = (len(plain) - 1) / max(seconds, 1e-9)
        same = "" if sampling.temperature else "the same tokens, " if plain == tokens else "DIFFERENT tokens, "
        print(f"plain decoding: {same}{plain_rate:.0f} tokens/s; speed-up {rate / plain_rate:.2f}", file=figures)
        result |= {"speedup": rate / plain_rate, "identical": plain == tokens}
    if arguments.show_tree:
        tree_capacity = len(prompt) + shape.levels + 1
        print("\n" + show_tree(Engine(target, head, shape, sampling, capacity=tree_capacity), prompt, encoding))
    if arguments.json:
        print("\n" + json.dumps(result))


if __name__ == "__main__":
    main_guard(main)
