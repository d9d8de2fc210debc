"""Fixed texts, ceilings and objectives against decoding, loops and differences; the runner's resume and tables."""
import itertools
import json
import math
from dataclasses import asdict

import pytest
import torch

from gto import ablate, ceilings, checkpoint, compare, data, stages
from gto.candidates import path_log_prob
from gto.config import Config, preset
from gto.engine import Engine
from gto.errors import UserError
from gto.evaluate import acceptance
from gto.fixed_text import tau, write
from gto.loss import chain_loss, cut_loss, distill_loss, keep_loss
from gto.model import Prefix
from gto.objectives import candidate_loss
from gto.rollout import read, sample_groups
from gto.tree import TreeShape, draft_candidates
from tests.tiny import tiny_models, tiny_prompts

SHAPE = TreeShape(3, 4, 9)


def test_walking_a_fixed_text_is_decoding():
    """At T=0 cycle by cycle; and the sampled text is the target's, whoever drafts."""
    target, head = tiny_models(seed=5)
    prompts = tiny_prompts(6)
    fixed = write(target, prompts, 20, 0.0, SHAPE.levels)
    expected, outputs = acceptance(target, head, prompts, SHAPE, 0.0, 20, score_temp=0.6)
    for prompt, row, output in zip(prompts, fixed.text.tokens.tolist(), outputs):
        assert row[len(prompt):][:20] == output
    torch.testing.assert_close(tau(head, fixed, SHAPE, 0.6), expected)
    assert expected.max() > 1.2


def test_walking_a_sampled_text_has_the_tau_of_sampling():
    """In distribution: 400 walks against 400 decodings that draw afresh at every node."""
    target, head = tiny_models(seed=5)
    prompts = [[3, 1, 4]] * 400
    walked = tau(head, write(target, prompts, 12, 1.0, SHAPE.levels), SHAPE, 1.0)
    decoded, _ = acceptance(target, head, prompts, SHAPE, 1.0, 12, batch=400, score_temp=1.0, seed=7)
    error = ((walked.var() + decoded.var()) / 400).sqrt()
    assert abs(walked.mean() - decoded.mean()) < 4 * error and walked.mean() > 1.1


def enumerate_paths(tokens, parents):
    """[(token, token, ..)] of every candidate."""
    paths = []
    for token, parent in zip(tokens, parents):
        paths.append((*(paths[parent - 1] if parent else ()), token))
    return paths


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@torch.no_grad()
def test_path_probabilities_equal_plain_forwards(temperature):
    target, head = tiny_models(seed=2, draft_vocab=20)
    text = read(target, torch.randint(29, (2, 12)))
    rows, length = torch.tensor([0, 1, 1]), torch.tensor([4, 9, 6])
    root = text.tokens[rows, length]
    prefix = Prefix(text.kv, length, rows)
    hidden = torch.randn(3, 24)
    cache = Prefix(head.new_cache(3, 12), torch.zeros(3, dtype=torch.long))
    tokens, parents, _ = draft_candidates(head, hidden, cache, SHAPE, 1.0)
    found = path_log_prob(target, root, tokens, parents, prefix, SHAPE, temperature).exp()
    for b in range(3):
        paths = enumerate_paths(tokens[b].tolist(), parents[b].tolist())
        assert len(paths) == len(set(paths)) == SHAPE.candidates
        for c in (0, 4, 11, 20, 29):
            whole = torch.cat([text.tokens[rows[b], :length[b] + 1], torch.tensor(paths[c])])[None]
            logits = target.logits(target(whole)[0])[0, length[b]:-1]
            if temperature == 0:
                expected = float(all(logits.argmax(-1) == torch.tensor(paths[c])))
            else:
                steps = (logits / temperature).log_softmax(-1)
                expected = math.exp(sum(steps[i, x].item() for i, x in enumerate(paths[c])))
            assert found[b, c].item() == pytest.approx(expected, abs=1e-4)


def test_ceilings_are_ceilings():
    target, head = tiny_models(seed=5)
    prompts = [[3, 1, 4, 1]] * 40
    greedy, sampled = write(target, tiny_prompts(40), 24, 0.0, 4), write(target, prompts, 24, 1.0, 4)
    # The target drafts its own arg-max path whatever the tree keeps beside it.
    torch.testing.assert_close(ceilings.self_tau(target, greedy, TreeShape(3, 4, 4), 0.01), torch.full((40,), 5.0))
    for fixed, T in ((greedy, 0.0), (sampled, 1.0)):
        drafted = tau(head, fixed, SHAPE, 1.0).mean()
        best = ceilings.rerank_tau(target, head, fixed, SHAPE, 1.0, T).mean()
        assert drafted < best < ceilings.self_tau(target, fixed, SHAPE, 1.0 if T else 0.01).mean()


def test_the_target_as_its_own_head_is_calibrated():
    """Then scores are path probabilities: calibration of the oracle is exact, node by node."""
    target, _ = tiny_models(seed=5)
    text = read(target, torch.randint(29, (2, 12)))
    rows, length = torch.tensor([0, 1, 1]), torch.tensor([4, 9, 6])
    tokens, parents, scores = draft_candidates(ceilings.TargetAsHead(target), text.logits[rows, length],
                                               Prefix(text.kv, length + 1, rows), SHAPE, 1.0)
    log_P = path_log_prob(target, text.tokens[rows, length], tokens, parents, Prefix(text.kv, length, rows), SHAPE, 1.0)
    torch.testing.assert_close(scores, log_P, atol=1e-4, rtol=1e-4)


def test_calibration_table_counts_every_rank_once():
    target, head = tiny_models(seed=5)
    table = ceilings.calibration(target, head, write(target, [[1, 2, 3]] * 3, 20, 0.0, 4), SHAPE, 1.0, 0.0)
    assert [row[:2] for row in table] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 8), (9, 9), (10, 18)]
    said = [row[2] for row in table]
    assert said == sorted(said, reverse=True) and all(0 <= row[3] <= 1 for row in table)


# Objectives --------------------------------------------------------------------------------------------------------

def test_cut_has_the_gradient_of_the_soft_expected_acceptance():
    """Against finite differences of sum_j w_j P_j, the threshold solved for so that the sum of w stays the same."""
    torch.manual_seed(0)
    scores = torch.randn(1, 7, dtype=torch.float64, requires_grad=True)
    P = torch.rand(1, 7, dtype=torch.float64)
    cut_loss(scores, P, nodes=3).backward()
    around = scores.detach().sort(descending=True).values[0, 2:4].mean()

    def inclusion(s, threshold):
        return torch.sigmoid((s - threshold) / 0.5)

    kept = inclusion(scores.detach(), around).sum()

    def expected(s):
        low, high = torch.tensor(-20.0, dtype=torch.float64), torch.tensor(20.0, dtype=torch.float64)
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if inclusion(s, middle).sum() > kept else (low, middle)
        return (inclusion(s, middle) * P).sum()

    for j in range(7):
        step = torch.zeros(1, 7, dtype=torch.float64)
        step[0, j] = 1e-5
        slope = (expected(scores.detach() + step) - expected(scores.detach() - step)) / 2e-5
        assert scores.grad[0, j].item() == pytest.approx(-slope.item(), abs=1e-5)


def test_chain_loss_is_minus_the_expected_accepted_drafts():
    """By enumerating rejection sampling: accept x ~ q with min(1, p/q)."""
    torch.manual_seed(0)
    p, q = torch.rand(2, 3, 4).softmax(-1), torch.rand(2, 3, 4).softmax(-1)
    total = 0.0
    for r, n in itertools.product(range(2), range(1, 4)):
        total += math.prod(sum(q[r, j, x].item() * min(1, (p[r, j, x] / q[r, j, x]).item()) for x in range(4))
                           for j in range(n)) / 2
    found = chain_loss(q.log()[None], p[None], torch.ones(1, 2, 3))
    assert found.item() == pytest.approx(-total, abs=1e-5)


def test_keep_loss_counts_the_greedy_path_above_the_cut():
    """With a hard cut: by loops, the steps of each chain whose path score is above it, as long as it follows the target."""
    target, head = tiny_models(seed=6)
    own = torch.randint(29, (3, 6), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = torch.tensor(Engine(target, None, batch=3, capacity=20).complete(own, 14))
    tokens[:, 13] = (tokens[:, 13] + 1) % 29                      # here the text leaves the target's choice
    text, config = read(target, tokens), Config(unroll=2)
    log_q, labels, weight = stages.unroll_text(config, head, text)
    on_path = stages.greedy_places(text, weight)
    (B, R, J), choice, count, steps = weight.shape, text.logits.argmax(-1), 0, 0
    score = (log_q / 0.7).log_softmax(-1)
    for b, r in itertools.product(range(B), range(R)):
        path = 0.0
        for j in range(J):
            if not weight[b, r, j] or j and tokens[b, r + 1 + j] != choice[b, r + j]:
                break
            steps += 1
            path += score[b, r, j, labels[b, r, j].argmax()].item()
            count += path > -5
    assert on_path.sum() == steps and 0 < count < steps < B * R * J
    assert keep_loss(log_q, labels, on_path, width=1e-6).item() == pytest.approx(-count / (B * R))
    loss = keep_loss(log_q, labels, on_path)
    loss.backward()
    assert head.fc.weight.grad.abs().max() > 0


def test_distill_loss_is_least_where_the_head_is_the_target():
    parents = torch.tensor([[0, 0, 1, 1, 2, 2]])
    T = torch.tensor([0.7, 0.3, 0.4, 0.6, 0.9, 0.1])
    P = T * torch.tensor([1, 1, 0.7, 0.7, 0.3, 0.3])
    logits = torch.zeros(3, 2, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.05)
    for _ in range(300):
        step = logits.log_softmax(-1)
        scores = torch.cat([step[0], step[0, 0] + step[1], step[0, 1] + step[2]])[None]
        loss = distill_loss(scores, P[None], parents)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    torch.testing.assert_close(logits.softmax(-1).flatten(), T, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("changes", [dict(objective="gto", debias=False), dict(objective="keep"), dict(objective="tv"),
                                     dict(objective="cut"), dict(objective="distill")], ids=lambda c: c["objective"])
def test_every_objective_trains(tmp_path, changes):
    """The objective's gradient reaches the head, is clipped alone and added to the token loss's."""
    target, reference = tiny_models(seed=6)
    texts = torch.randint(29, (4, 24))
    trained = []
    for omega, clip in ((0.0, 0.0), (5.0, 0.0), (5.0, 1e-9)):
        config = Config(tree="3,3,8", groups=2, group_size=4, unroll=2, clip=100.0, omega=omega, tree_clip=clip,
                        **changes)
        head = stages.copy_of(reference, target)
        stages.train_head("x", config, target, head, texts, 1, 0.2, 2, 1, tmp_path, reference=reference)
        trained.append(torch.cat([p.flatten() for p in head.parameters()]).detach())
    without, with_it, clipped = trained
    torch.testing.assert_close(clipped, without, atol=1e-4, rtol=1e-3)
    assert (with_it - without).abs().max() > 1e-3


def test_cut_learns_to_keep_what_is_accepted():
    """Without any token loss the kept tree's expected acceptance rises."""
    target, head = tiny_models(seed=6)
    text = read(target, torch.randint(29, (4, 32), generator=torch.Generator().manual_seed(0)))
    config = Config(tree="4,2,6", objective="cut")
    roots, real = sample_groups(text.supervised, 16, 1, 2, torch.Generator().manual_seed(1))
    optimizer, seen = torch.optim.AdamW(head.parameters(), 3e-3), []
    for _ in range(40):
        loss, figures = candidate_loss(config, target, head, text, roots, real / real.sum())
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        seen.append(figures["expected"].item())
        assert seen[-1] <= figures["possible"].item() + 1e-5
    assert seen[-1] > 1.2 * seen[0]


@pytest.mark.parametrize("changes, message", [
    (dict(objective="best"), "no objective 'best'"), (dict(objective="cut", tree="1,4,4"), "choose fewer nodes")])
def test_bad_objectives(changes, message):
    with pytest.raises(UserError, match=message):
        preset("laptop", **changes)


# The runner --------------------------------------------------------------------------------------------------------

def test_interval_covers_the_truth():
    """95 % intervals of crossed random effects, three seeds, twenty prompts: they may be too wide, not too narrow."""
    generator, covered, count = torch.Generator().manual_seed(0), 0, 400
    for _ in range(count):
        seeds, prompts, rest = (torch.randn(shape, generator=generator) for shape in ((3, 1), (1, 20), (3, 20)))
        mean, half = compare.interval(0.3 * seeds + prompts + rest)
        covered += abs(mean) < half
    assert covered / count > 0.93
    assert compare.interval(torch.full((3, 5), 0.25)) == (0.25, 0.0)


def record(seed, *taus):
    return {"seed": seed, "steps": 5, "seconds": 1.0, **{
        f"T={T}": {"score_temp": 0.4, "tau": [tau + T for tau in taus]} for T in (0, 1)}}


def test_differences_are_paired_by_prompt_and_seed_with_the_best_control():
    """By hand: prompts and seeds differ by far more than the recipes do."""
    results = {"draft": [record(0, 1.0, 2.0)],
               "control": [record(0, 2.0, 4.0), record(1, 3.0, 5.0)],
               "control-sharp": [record(0, 3.0, 5.0), record(1, 4.0, 6.0)],
               "cut": [record(0, 3.1, 5.1), record(1, 4.1, 6.1), record(2, 9.0, 9.0)]}
    assert compare.best_control(results, 0) == compare.best_control(results, 1) == "control-sharp"
    assert compare.over(results, "cut", "control-sharp", 0) == "+0.100 ± 0.000 (+2.2 %)"   # seed 2 has no control yet
    assert compare.over(results, "cut", "control", 1) == "+1.100 ± 0.000 (+24.4 %)"
    assert compare.over(results, "draft", "control", 0).startswith("-2.000 ± ")
    assert compare.over(results, "control", "control", 0) == compare.over(results, "cut", "gto", 0) == ""
    assert "| cut | 3 | 6.067 | 0.4 | +0.100 ± 0.000 (+2.2 %) |" in compare.recipe_table(results, ["cut", "gto"])
    # Before any control is finished the rest can be shown.
    alone = compare.recipe_table({"cut": results["cut"]}, ["cut"])
    assert "| cut | 3 | 6.067 | 0.4 |  | 7.067 | 0.4 |  | 5 | 1 |" in alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory as train.py --stage draft leaves it, of random models."""
    folder = tmp_path_factory.mktemp("ablate")
    (folder / "words.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(3000)))
    data.prepare(str(folder / "data"), inputs=[str(folder / "words.txt")], vocab_size=300)
    target, head = tiny_models(seed=5, vocab=300)
    config = Config(tree="3,3,6", length=32, groups=2, group_size=4, unroll=2, eval_prompts=4, eval_tokens=12,
                    gto_batch=1, head_batch=1)
    (folder / "out").mkdir()
    (folder / "out/config.json").write_text(json.dumps(asdict(config)))
    checkpoint.save_model(folder / "out/target.pt", target), checkpoint.save_model(folder / "out/draft.pt", head)
    checkpoint.save(folder / "out/text.pt", kind="text", tokens=torch.randint(300, (8, 32)))
    return folder


def ablation(folder, *arguments):
    ablate.main(["--out-dir", str(folder / "out"), "--data", str(folder / "data"), "--device", "cpu", *arguments])
    return (folder / "out/ablate/table.md").read_text()


def test_ablation_from_ceilings_to_tables(folder, capsys, monkeypatch):
    with pytest.raises(FileNotFoundError):                         # no table: nothing was trained
        ablation(folder, "--only", "ceilings")
    assert "the target drafts for itself" in capsys.readouterr().out and not (folder / "out/ablate/plan.json").exists()
    # Interrupted in the second seed: what is there makes a table of one seed.
    trained, train = [], ablate.train

    def dies(setting, name, steps, seed, out):
        if name in trained and seed == 1:
            raise KeyboardInterrupt
        trained.append(name)
        return train(setting, name, steps, seed, out)

    arguments = "--only", "cut", "m=4", "--steps", "2", "--seeds", "2"
    monkeypatch.setattr(ablate, "measure_paces", lambda setting, kinds: {k: 1.0 + (k == "gto") for k in kinds})
    monkeypatch.setattr(ablate, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        ablation(folder, *arguments)
    monkeypatch.setattr(ablate, "train", train)
    partial = ablate.read_results(folder / "out/ablate")
    assert [len(partial[name]) for name in ("control", "control-sharp", "gto", "cut")] == [1, 1, 1, 1]
    assert "| cut | 1 |" in (folder / "out/ablate/table.md").read_text()

    table = ablation(folder, *arguments)
    results = ablate.read_results(folder / "out/ablate")
    assert {name: [run["seed"] for run in runs] for name, runs in results.items()} == {
        "draft": [0], **{name: [0, 1] for name in ("control", "control-sharp", "gto", "cut", "m=4")}}
    assert all(results[name][0] == partial[name][0] for name in partial), "a finished run was run again"
    assert results["control"][0]["steps"] == 4 and results["gto"][0]["steps"] == 2    # equally long
    assert results["gto"][0]["T=0"]["trees"].keys() == results["control"][1]["T=1"]["trees"].keys()
    for text in ("| cut | 2 |", "| m=4 | 2 |", "### Other trees at inference", "score temp. 0.4", "over control"):
        assert text in table
    assert ablation(folder, *arguments[:-1], "2") == table

    for changed, message in ((("--steps", "3"), "--steps 2"), (("--tree", "3,3,7"), "another draft.pt"),
                             (("--only", "nothing"), "nothing is called 'nothing'"), (("--seeds", "0"), "positive")):
        with pytest.raises(UserError, match=message):
            ablation(folder, *changed)
