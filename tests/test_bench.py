"""The benchmark: its counters against independent recounts, its conversations, and what it says to bad input."""
import json

import pytest
import torch

from gto import checkpoint
from gto.bench import __main__ as bench
from gto.engine import Engine
from gto.evaluate import Decoded, FixedText, accepted_path, diagnosis, timed
from gto.released import chat
from gto.rollout import target_forward
from gto.tokenizer import END_OF_TEXT, LLAMA3_PATTERN, make_encoding, save_tokenizer
from gto.tree import Tree, TreeShape, ancestor_mask
from gto.util import UserError
from tests.tiny import tiny_models, tiny_prompts

LETTERS = 5                                                       # so few that random drafts are often right


def engine_of(shape, head=True):
    target, draft_head = tiny_models(vocab=LETTERS)
    return Engine(target, draft_head if head else None, TreeShape.parse(shape), capacity=200)


def written(count, new_tokens):
    """Prompts and answers by plain greedy decoding."""
    engine, prompts = engine_of("1,1,1", head=False), tiny_prompts(count, LETTERS)
    return prompts, [timed(engine, prompt, new_tokens).tokens for prompt in prompts]


def bytes_encoding(specials=(END_OF_TEXT,)):
    ranks = {bytes([byte]): byte for byte in range(256)}
    return make_encoding("bytes", LLAMA3_PATTERN, ranks, {name: 256 + i for i, name in enumerate(specials)})


def write_run(out, questions, target, **heads):
    """A run's folder: tokenizer, questions, checkpoints."""
    (out / "meta.json").write_text(json.dumps(save_tokenizer(out / "tokenizer.model", bytes_encoding())))
    (out / "prompts.jsonl").write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in questions))
    for name, model in {"target": target, **heads}.items():
        checkpoint.finish(name, model, out, seconds=2.0)
    return out


@torch.no_grad()
def test_misalignment_equals_a_recount_by_decoding():
    """T=0, cycle by cycle; the path alone is what a chain gets accepted behind the same text."""
    engine, chain, texts, shares, counts = engine_of("3,4,8"), engine_of("1,4,4"), written(2, 40), [], set()
    for prompt, answer in zip(*texts):
        start, cycles = 1, []
        while start <= len(answer) - 4:                           # the tree ends within the text
            for e in (engine, chain):
                e.prefill([prompt + answer[:start - 1]])
            tree, path = engine.draft(), chain.draft()
            engine.verify(tree), chain.verify(path)
            accepted, alone = engine.num_accepted.item(), chain.num_accepted.item()
            kept = accepted_path(tree, path.tokens, 0)[1].item()
            assert accepted >= min(alone, kept)                   # what is kept of the path is accepted like any other
            cycles.append([kept < 4, accepted == alone, *(accepted > depth for depth in range(4))])
            counts.add((kept, accepted))
            start += accepted + 1
        shares.append(torch.tensor(cycles).float().mean(0))
    found = []
    for prompt, answer in zip(*texts):
        fixed = FixedText(target_forward(engine.target, torch.tensor([prompt + answer])),
                          *torch.tensor([[len(prompt)], [len(prompt) + len(answer) - 4]]))
        _, *both, reached, _ = diagnosis(engine.head, fixed, engine.shape, engine.score_temp)
        found.append(torch.tensor([*both, *reached]))
    assert torch.allclose(torch.stack(found), torch.stack(shares))
    assert len(counts) > 4                                        # else the test shows nothing


def test_a_path_is_kept_as_far_as_all_of_it_is():
    # Greedy path 7 8 9. First tree: root, 7, 5, 7-8. Second: 6, 6-8, 6-8-9: right tokens below a wrong one.
    tokens, parents = torch.tensor([[1, 7, 5, 8], [1, 6, 8, 9]]), torch.tensor([[0, 0, 0, 1], [0, 0, 1, 2]])
    mask = ancestor_mask(parents, 3)
    tree = Tree(tokens, parents, mask, mask.sum(-1) - 1, torch.zeros(2, 4))
    path = tree._replace(tokens=torch.tensor([[1, 7, 8, 9]]).expand(2, -1))
    assert accepted_path(tree, path.tokens, 0)[1].tolist() == [2, 0]


def test_summary_counts_the_bonus_token_and_pairs_by_prompt():
    ended = Decoded([0], 0.0, 0)                                  # with the token of the prefill
    mine = [Decoded([0] * 6, 0.02, 2), Decoded([0] * 10, 0.03, 3), ended]
    ar = [Decoded([0] * 6, 0.05, 5), Decoded([0] * 10, 0.09, 9), ended]
    assert bench.summary(mine, ar) == pytest.approx({             # ar: 100 tokens/s on both
        "answers": 2, "tau": 14 / 5, "tokens_per_s": (250 + 300) / 2, "speedup": (2.5 + 3.0) / 2, "in_all": 2.8,
        "cycle_ms": 10})
    with pytest.raises(UserError, match="first token"):
        bench.summary(mine[2:], ar[2:])


def test_history_with_template(tmp_path):
    encoding, start, end = bytes_encoding(("<|im_start|>", "<|im_end|>")), "<|im_start|>", "<|im_end|>\n"
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}" + start + "{{ m.role }}\n{{ m.content }}" + end + "{% endfor %}" + start)
    ids = chat.encode_turns(chat.load(tmp_path, encoding), ["ab", " yes ", "c"])
    assert encoding.decode(ids) == f"{start}user\nab{end}{start}assistant\n yes {end}{start}user\nc{end}{start}"
    assert encoding.encode_single_token("<|im_end|>") in ids


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """With a question of two turns, of which the first is asked."""
    target, head = tiny_models(vocab=257)
    questions = [["def f(", "again"], ["import os"]]
    return write_run(tmp_path_factory.mktemp("bench"), questions, target, control=head, gto=head)


def run(out, flags):
    bench.main(["--out-dir", str(out), "--device", "cpu", *flags.split()])


def test_whole_benchmark(out, capsys):
    run(out, f"--head tiny={out}/gto.pt --tree 1,3,3 --tree 3,3,6 --max-new-tokens 12 --report {out}/page.html")
    assert "a decode by tiny, 3,3,6" in (out / "page.html").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    report = json.loads(printed.splitlines()[-1])
    methods = ["ar", "tiny, 1,3,3", "tiny, 3,3,6"]
    assert [(row["T"], row["method"]) for row in report["rows"]] == [(t, m) for t in "01" for m in methods]
    for row in report["rows"]:
        assert row["answers"] == 2 and f"| {row['T']} | {row['method']} | 2 |" in printed
        assert row["method"] != "ar" or row["tau"] == 1 and row["speedup"] == 1
        assert row["equal"] == "2 of 2"
