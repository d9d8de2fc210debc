"""Fixed texts and ceilings against decoding and plain forwards; the ablations' differences, resume and tables."""
import json
import math
from dataclasses import asdict

import pytest
import torch

from gto import checkpoint
from gto.bench import ablate
from gto.bench.ablate import TargetAsHead, ceilings
from gto.config import Config
from gto.engine import Engine
from gto.evaluate import fixed_text, tau, timed
from gto.model import Prefix
from gto.rollout import target_forward
from gto.page import path_log_prob
from gto.tree import TreeShape, draft_candidates
from gto.util import UserError, append_log
from gto.verify import Sampling
from tests.test_bench import write_run
from tests.tiny import tiny_models, tiny_prompts

SHAPE = TreeShape(3, 4, 9)


def test_replaying_a_fixed_text_is_decoding():
    """At T=0 cycle by cycle; and the text is the target's, whoever drafts."""
    target, head = tiny_models(seed=5)
    prompts = tiny_prompts(6)
    fixed = fixed_text(target, prompts, 20, 0.0, SHAPE.depth)
    decoded = [timed(Engine(target, head, SHAPE, capacity=50, score_temp=0.6), prompt, 20) for prompt in prompts]
    assert all(row[len(prompt):][:20] == each.tokens[:20]
               for row, prompt, each in zip(fixed.text.tokens.tolist(), prompts, decoded))
    expected = torch.tensor([each.tau for each in decoded])
    torch.testing.assert_close(tau(head, fixed, SHAPE, 0.6), expected)
    assert expected.max() > 1.2


def test_replaying_a_sampled_text_has_the_tau_of_sampling():
    """In distribution: 400 replays against 400 decodings that draw afresh at every node."""
    target, head = tiny_models(seed=5)
    prompts = [[3, 1, 4]] * 400
    replayed = tau(head, fixed_text(target, prompts, 12, 1.0, SHAPE.depth), SHAPE, 1.0)
    torch.manual_seed(7)
    engine = Engine(target, head, SHAPE, Sampling(1.0), batch=400, capacity=30, score_temp=1.0)
    length, cycles = torch.ones(400), torch.zeros(400)
    engine.prefill(prompts)
    stream = engine.cycles()
    while (going := length < 12).any():
        length, cycles = length + going * torch.tensor([len(tokens) for tokens in next(stream)]), cycles + going
    decoded = (length - 1) / cycles
    error = ((replayed.var() + decoded.var()) / 400).sqrt()
    assert abs(replayed.mean() - decoded.mean()) < 4 * error and replayed.mean() > 1.1


@pytest.mark.parametrize("T", [0.0, 0.7, 1.0])
@torch.no_grad()
def test_path_probabilities_equal_plain_forwards(T):
    """Of what the target drafts for itself behind some tokens of two texts: its scores are those at T=1."""
    target, _ = tiny_models(seed=2)
    text = target_forward(target, torch.randint(29, (2, 12), generator=torch.Generator().manual_seed(2)))
    rows, length = torch.tensor([0, 1, 1]), torch.tensor([4, 9, 6])
    tokens, parents, scores = draft_candidates(TargetAsHead(target), target.logits(text.hidden[rows, length]),
                                               Prefix(text.kv, length + 1, rows), SHAPE, 1.0)
    found = path_log_prob(target, text.tokens[rows, length], tokens, parents, Prefix(text.kv, length, rows), SHAPE, T)
    if T == 1:
        torch.testing.assert_close(scores, found, atol=1e-4, rtol=1e-4)
    for b in range(3):
        paths = []
        for token, parent in zip(tokens[b].tolist(), parents[b].tolist()):
            paths.append((*(paths[parent - 1] if parent else ()), token))
        assert len(paths) == len(set(paths)) == SHAPE.num_candidates
        for c in (0, 4, 11, 20, 29):
            path = torch.tensor(paths[c])
            whole = torch.cat([text.tokens[rows[b], :length[b] + 1], path])
            logits = target.logits(target(whole[None])[0])[0, length[b]:-1]
            expected = float((logits.argmax(-1) == path).all()) if T == 0 else (
                logits / T).log_softmax(-1).gather(1, path[:, None]).sum().exp().item()
            assert math.exp(found[b, c]) == pytest.approx(expected, abs=1e-4)


def test_ceilings_are_ceilings():
    target, head = tiny_models(seed=5)
    greedy = fixed_text(target, tiny_prompts(40), 24, 0.0, 4)
    sampled = fixed_text(target, [[3, 1, 4, 1]] * 40, 24, 1.0, 4)
    for fixed, T in ((greedy, 0.0), (sampled, 1.0)):
        row = ceilings(target, head, fixed, SHAPE, 1.0, T)
        _, _, drafted, ranked, own, *calibration = row.values()
        assert drafted == tau(head, fixed, SHAPE, 1.0).mean() and drafted < ranked < own
        assert T or own == 5                                      # the target drafts its own arg-max path
        assert list(row)[5:] == [f"rank {each}" for each in ("1..1", "2..2", "3..4", "5..8", "9..16")]
        promised, accepted = zip(*(map(float, cell.split(" / ")) for cell in calibration))
        assert list(promised) == sorted(promised, reverse=True) and 0 <= min(accepted) <= max(accepted) <= 1


def test_differences_are_paired_by_prompt_and_seed():
    """By hand: prompts and seeds differ by far more than the recipes do."""
    def records(*taus):
        return [{"T=0": {"tau": tau}} for tau in taus]

    results = {"draft": records([1.0, 2.0]), "control": records([2.0, 4.0], [3.0, 5.0]),
               "keep": records([2.1, 4.1], [3.1, 5.1], [9.0, 9.0]), "gto": records([2.0, 4.4], [3.4, 5.0])}
    assert ablate.over_control(results, "keep", "T=0") == "+0.100 ± 0.000"            # seed 3 has no control yet
    assert ablate.over_control(results, "draft", "T=0") == "-1.500 ± 0.500"           # one seed: over prompts alone
    assert ablate.over_control(results, "gto", "T=0") == "+0.200 ± 0.000"
    assert ablate.over_control(results, "control", "T=0") == ablate.over_control({"keep": [1]}, "keep", "T=0") == ""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder as train.py --stage draft leaves it, of random models."""
    target, head = tiny_models(seed=5, vocab=257)
    out = write_run(tmp_path_factory.mktemp("ablate"), [[f"def f{i}(x):"] for i in range(8)], target, draft=head)
    config = Config(tree="3,3,6", length=32, prompt_length=8, groups=2, group_size=4, unroll=2, eval_prompts=4,
                    eval_tokens=12, gto_batch=1, head_batch=1, gto_steps=9, head_steps=4)
    (out / "config.json").write_text(json.dumps(asdict(config)))
    checkpoint.save(out / "text.pt", kind="text", tokens=torch.randint(257, (8, 32)), supervised=torch.ones(8, 32) > 0)
    return out


def test_ablation_from_ceilings_to_tables(out, monkeypatch):
    def ablation(flags):
        ablate.main(["--out-dir", str(out), "--steps", "2", "--device", "cpu", *flags.split()])
        return (out / "ablate-2-3,3,6/table.md").read_text()

    assert "the target drafts for itself" in ablation("--only ceilings")
    assert ablate.read_results(out / "ablate-2-3,3,6").keys() == {"draft"}
    train_head, failures = ablate.train_head, [KeyboardInterrupt]

    def timed_training(stage, config, *rest):
        """GTO takes a second a step, `keep` half of it, a control a quarter. The machine fails in the second seed."""
        if stage.name == "control-seed1" and failures:
            raise failures.pop()
        train_head(stage, config, *rest)
        seconds = stage.steps * (0.25 if rest[-2] is None else 1.0 if config.objectives == "gto" else 0.5)
        append_log(out / "ablate-2-3,3,6/log.jsonl", stage=stage.name, finished=True, seconds=seconds)

    flags = "--only keep m=4 --seeds 2"
    monkeypatch.setattr(ablate, "train_head", timed_training)
    monkeypatch.setattr(ablate, "TRIAL", 1)
    with pytest.raises(KeyboardInterrupt):
        ablation(flags)
    partial = ablate.read_results(out / "ablate-2-3,3,6")
    assert [len(partial[name]) for name in ("draft", "gto", "control", "keep", "m=4")] == [1, 2, 1, 1, 1]
    table, results = ablation(flags), ablate.read_results(out / "ablate-2-3,3,6")
    assert {name: [run["seed"] for run in runs] for name, runs in results.items() if name != "draft"} == {
        name: [0, 1] for name in ("gto", "control", "keep", "m=4")}
    assert all(results[name][:len(runs)] == runs for name, runs in partial.items()), "a finished run was run again"
    assert [results[name][0]["steps"] for name in ("gto", "m=4", "keep", "control")] == [2, 2, 4, 8]
    assert "| keep | 2 |" in table and "| m=4 | 2 |" in table and ablation(flags) == table
    before, *after = (checkpoint.read(out / file, "head")["model"]["fc.weight"] for file in (
        "draft.pt", "ablate-2-3,3,6/gto-seed1.pt", "ablate-2-3,3,6/control-seed1.pt", "ablate-2-3,3,6/keep-seed1.pt"))
    assert not any(torch.equal(before, weight) for weight in after)

    table, results = ablation("--only steps --seeds 1"), ablate.read_results(out / "ablate-2-3,3,6")
    assert {name: runs[0]["steps"] for name, runs in results.items() if "-" in name} == dict.fromkeys(
        ("control-steps", "control-sharp-steps", "keep-steps"), 2)
    assert "over control-steps, T=0" in table and len(results["control"]) == 2

    with pytest.raises(UserError, match="choose from"):
        ablation("--only x")
