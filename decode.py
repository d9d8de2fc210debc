"""Generate text by speculative decoding with a draft tree.

    python decode.py --prompt "def fibonacci(n):"
    python decode.py --prompt "class Queue:" --compare       the same by plain decoding: equal? how much faster?
    python decode.py --prompt "class Queue:" --show-tree     draw the first draft
    python decode.py --prompt "class Queue:" --report tree.html    step through all of them in a browser
    python decode.py --target smollm2 --chat --prompt "Why is the sky blue?"         after train.py --target smollm2

On a terminal, drafted tokens that the target accepted are green, tokens that the target added itself plain."""
import json
import sys
import time

import gto  # noqa: F401  before torch: it sets the thread environment
import torch

from gto.checkpoint import load_head, load_run, main_head
from gto.engine import Engine
from gto.evaluate import Decoded, timed
from gto.page import tree_text, watch, write_page
from gto.policy import make_engine
from gto.tokenizer import StreamDecoder
from gto.tree import TreeShape
from gto.util import FLAGS, UserError, argument_parser, at_least, main_guard, one_thread_if_small, start
from gto.verify import Sampling


def parse_arguments():
    parser = argument_parser("python decode.py", __doc__, *FLAGS)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--method", help="ar: plain decoding; draft, control, gto, keep: the head train.py left under"
                        " this name (default: of its last objective)")
    parser.add_argument("--head", help="instead: a head checkpoint, or a folder with an EAGLE-3 head")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--tree", type=TreeShape.parse, help="children,depth,nodes; default: as --policy decides")
    either.add_argument("--policy", choices=("rule", "ltd"),
                        help="decides on the tree, in every cycle (default: what gto.ltd found faster, else the rule)")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=128)
    parser.add_argument("--temperature", type=at_least(0, float), default=0.0)
    parser.add_argument("--top-k", type=at_least(0), default=0)
    parser.add_argument("--top-p", type=at_least(0, float), default=1.0)
    parser.add_argument("--compare", action="store_true", help="decode plainly too, and compare")
    parser.add_argument("--show-tree", action="store_true", help="draw the draft tree of the first cycle")
    parser.add_argument("--json", action="store_true", help="all results as one JSON object on the last line")
    arguments = parser.parse_args()
    if arguments.method == "ar" and (arguments.policy or arguments.compare or arguments.show_tree or arguments.report):
        raise UserError("--method ar drafts nothing: leave out --policy, --compare, --show-tree and --report")
    return arguments


def decode(engine, encoding, prompt, max_new_tokens, stop, show):
    """Print `show`, once the prompt is known to fit, and what is written. -> Decoded; how many tokens, by cycle."""
    green, plain = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("", "")
    decoder, tokens, cycles = StreamDecoder(encoding), [], []
    for (new,) in engine.generate([prompt], max_new_tokens, stop):
        if not tokens:                                                                # the prefill's, not timed
            print(show, end="", flush=True)
            began = time.perf_counter()
        tokens += new
        cycles.append(len(new))
        accepted, added = decoder.push(new[:-1]), decoder.push(new[-1:])
        print(f"{green}{accepted}{plain}{added}", end="", flush=True)
    seconds = time.perf_counter() - began
    print(decoder.finish())
    return Decoded(tokens, seconds, len(cycles) - 1), cycles[1:]


def main():
    arguments = parse_arguments()
    start(arguments.device)
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    out, target, encoding, encode, stop = load_run(arguments)
    one_thread_if_small(target)
    prompt, head, head_path = encode([arguments.prompt]), None, arguments.head
    if arguments.method != "ar":
        head_path = head_path or (out / f"{arguments.method}.pt" if arguments.method else main_head(out))
        head = load_head(head_path, target, target.norm.weight.dtype)
    n, capacity = arguments.max_new_tokens, min(len(prompt) + arguments.max_new_tokens, target.config.max_len)

    engine = make_engine(target, head, arguments.tree or arguments.policy, head_path, out, sampling, capacity)
    torch.manual_seed(arguments.seed)
    decoded, cycles = decode(engine, encoding, prompt, n, stop, show="" if arguments.chat else arguments.prompt)
    result = {"text": encoding.decode(decoded.tokens), "token_ids": decoded.tokens, "acceptance_lengths": cycles,
              "tau": decoded.tau, "tokens_per_second": decoded.tokens_per_second}
    print(f"\n{len(decoded.tokens)} tokens in {len(cycles)} cycles, {decoded.tau:.2f} a cycle (tau),"
          f" {decoded.tokens_per_second:.0f} tokens/s", file=sys.stderr)
    if arguments.compare:
        torch.manual_seed(arguments.seed)
        plain = timed(Engine(target, None, None, sampling, capacity=capacity), prompt, capacity - len(prompt), stop)
        identical, speedup = plain.tokens == decoded.tokens, decoded.tokens_per_second / plain.tokens_per_second
        same = "the same tokens, " if identical else "DIFFERENT tokens, "
        print(f"plain decoding: {same}{plain.tokens_per_second:.0f} tokens/s; speed-up {speedup:.2f}", file=sys.stderr)
        result |= {"speedup": speedup, "identical": identical}
    if arguments.show_tree or arguments.report:
        torch.manual_seed(arguments.seed)
        watched = watch(engine, prompt, encoding, n if arguments.report else min(n, engine.width + 1), stop)
        if arguments.show_tree:
            print("\n" + tree_text(watched))
        if arguments.report:
            write_page(arguments.report, "A decode by draft trees", watched)
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main_guard(main)
