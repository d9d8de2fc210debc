"""Phase I's and phase II's losses against loops, and where gradients flow."""
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from gto.config import Config
from gto.engine import Engine
from gto.loss import (Batch, advantages, debias, gto_objective, keep_objective, learnt_positions, ratio, soft_labels,
                      surrogate, token_loss, unroll_text)
from gto.model import Prefix
from gto.rollout import (Trees, rollout_trees, sample_groups, score_inner_nodes, sequence_log_prob, target_forward,
                         tree_reward)
from gto.training import copy_of
from gto.tree import Tree, TreeShape, draft_tree
from gto.verify import accept
from kernels.acceptance import score_nodes
from tests.test_kernels import random_trees
from tests.tiny import tiny_models

CONFIG = Config(tree="3,3,8", groups=2, group_size=4, unroll=2)


def text_of(target, rows=2, length=24, seed=0):
    tokens = torch.randint(target.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    return target_forward(target, tokens)


def batch_of(config, target, head, reference, text):
    """What an objective gets, as in training."""
    roots, valid = sample_groups(text.supervised, config.groups, config.group_size, TreeShape.parse(config.tree).depth,
                                 torch.Generator().manual_seed(0))
    total = learnt_positions(text.supervised, config.unroll).sum((0, 1))
    unrolled = unroll_text(config, target, head, text)
    return Batch(config, target, head, reference, text, *unrolled, total, roots, valid / valid.sum(), [])


def moved(head, target, by=0.01):
    """A copy of the head, a little away: far away, the clip stops everything."""
    reference = copy_of(head, target)
    for p in reference.parameters():
        p.data += by * torch.randn_like(p)
    return reference


@pytest.mark.parametrize("draft_vocab", [7, 4])
def test_token_loss_equals_a_loop(draft_vocab):
    torch.manual_seed(0)
    B, R, J, V = 2, 3, 2, 7
    ids = torch.randperm(V)[:draft_vocab].sort().values
    log_q = torch.randn(B, R, J, draft_vocab).log_softmax(-1)
    logits, weight = torch.randn(B, R, J, V), (torch.rand(B, R, J) < 0.7).float()
    total = norm = 0.0
    for j in range(J):
        values = []
        for b in range(B):
            for r in range(R):
                if weight[b, r, j] and logits[b, r, j].argmax() in ids:
                    label = (logits[b, r, j, ids] / 0.5).softmax(-1)
                    values.append(-(label * log_q[b, r, j]).sum().item())
        total, norm = total + 0.8 ** j * sum(values) / len(values), norm + 0.8 ** j
    logits, target = logits.flatten(1, 2), SimpleNamespace(unembed=SimpleNamespace(weight=torch.eye(V)))
    text = SimpleNamespace(hidden=logits, choice=logits.argmax(-1))
    labels, teachable = soft_labels(target, text, ids, temperature=0.5)
    labels, weight = labels.view(B, R, J, -1), weight * teachable.view(B, R, J)
    assert token_loss(log_q, labels, weight).item() == pytest.approx(total / norm, abs=1e-5)
    # Padding changes nothing, whatever stands in it.
    pad = lambda x, value: torch.cat([x, torch.full_like(x[:, :1], value)], dim=1)
    padded = token_loss(pad(log_q, -50.0), pad(labels, 9.0), pad(weight, 0.0))
    assert padded.item() == pytest.approx(total / norm, abs=1e-5)


def test_group_equations_equal_loops():
    """Eq. 9-12 on two groups of three."""
    torch.manual_seed(1)
    R, R0, log_q, log_q0 = (torch.randn(1, 2, 3, dtype=torch.float64) for _ in range(4))
    length = torch.tensor([[[0, 1, 2], [3, 1, 5]]])
    eps, delta, total = 0.2, 1e-4, 0.0
    for k in range(2):
        gain = [(R[0, k, i] - R0[0, k, i]).item() for i in range(3)]
        mean = sum(gain) / 3
        std = math.sqrt(sum((x - mean) ** 2 for x in gain) / 3)
        for i in range(3):
            A = (gain[i] - mean) / (std + delta)
            s = math.exp((log_q[0, k, i] - log_q0[0, k, i]).item() / max(length[0, k, i].item(), 1))
            total -= min(s * A, min(max(s, 1 - eps), 1 + eps) * A) / 6
    found = surrogate(ratio(log_q, log_q0, length), advantages(debias(R, R0), delta), eps)
    assert found.item() == pytest.approx(total, abs=1e-12)


def test_surrogate_stops_at_the_clip():
    """No gradient where the ratio has already moved past the clip in the advantage's direction; all of it elsewhere."""
    s = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0], requires_grad=True)
    surrogate(s, torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0]), 0.2).backward()
    torch.testing.assert_close(s.grad, torch.tensor([0.0, 0.2, -0.2, 0.0, -0.4]))


def test_gradient_only_through_the_students_ratio():
    target, head = tiny_models(seed=3)
    reference, text = moved(head, target), text_of(target)
    loss, metrics = gto_objective(batch_of(CONFIG, target, head, reference, text))
    loss.backward()
    assert sum(p.grad.abs().sum() for p in head.parameters() if p.grad is not None) > 0
    assert all(p.grad is None for p in (*reference.parameters(), *target.parameters()))
    assert not metrics["reward"].requires_grad and not metrics["gain"].requires_grad


def test_a_head_equal_to_its_reference_gets_no_gradient_from_debiased_rewards():
    """Then all debiased rewards are 0: GTO alone never starts, L_token must move the head first."""
    target, head = tiny_models(seed=3)
    text = text_of(target)
    loss, _ = gto_objective(batch_of(CONFIG, target, head, copy_of(head, target), text))
    loss.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in head.parameters())
    biased = Config(**{**vars(CONFIG), "debias": False})
    loss, _ = gto_objective(batch_of(biased, target, head, copy_of(head, target), text))
    loss.backward()
    assert sum(p.grad.abs().sum() for p in head.parameters() if p.grad is not None) > 0


@torch.no_grad()
def test_rollouts_draft_and_score_what_decoding_would():
    """Trees that share their sequence's cache, against an engine that decodes each prefix by itself."""
    target, head = tiny_models(seed=5)
    text, shape = text_of(target, rows=2, length=20), TreeShape(3, 3, 10)
    roots = torch.tensor([[0, 4, 9], [2, 3, 15]])[..., None]       # groups of one
    trees, = rollout_trees(target, [head], text, roots, shape)
    log_q = sequence_log_prob(head, text, roots, trees)
    seen = 0
    for b in range(2):
        for r in range(3):
            prefix = text.tokens[b, :roots[b, r, 0] + 1].tolist()  # the root token follows
            engine = Engine(target, head, shape, score_temp=1.0)
            engine.prefill([prefix])
            engine.emitted[0, 0] = text.tokens[b, roots[b, r, 0] + 1]
            tree = engine.draft()
            engine.verify(tree)
            n = int(engine.num_accepted)
            assert trees.length[b, r] == n
            accepted = engine.emitted[0, :n].tolist()
            assert trees.accepted[b, r, 0].tolist() == accepted + [0] * (shape.depth - n)
            scores = {tuple(tree.tokens[0, tree.mask[0, i]].tolist()[1:]): tree.scores[0, i].item() for i in range(11)}
            assert log_q[b, r].item() == pytest.approx(scores[tuple(accepted)], abs=1e-3)
            seen += n
    assert seen > 0, "nothing was accepted: the test shows nothing"


@torch.no_grad()
def plain_tree(target, head, text, row, root, shape):
    """One tree, by itself, and what the target makes of all its nodes. -> tree, its prefix, choice, log_prob."""
    hidden, kv = head.read(text.features, text.tokens)
    length, row = torch.tensor([root + 1]), torch.tensor([row])
    tree = draft_tree(head, hidden[row, length - 1], text.tokens[row, length], Prefix(kv, length, row), shape, 1.0)
    prefix = Prefix(text.kv, length, row)
    hidden, *_ = target(tree.tokens, length[:, None] + tree.depth, tree.mask, prefix)
    return tree, prefix, *score_nodes(target.logits(hidden), tree.tokens, tree.parents)


def test_merged_trees_are_scored_as_each_by_itself(monkeypatch):
    """Over inner nodes alone, which neighbours and two heads have in common."""
    target, head = tiny_models(seed=8)
    text, shape = text_of(target), TreeShape(3, 4, 12)
    text.tokens[1, 10:12] = text.choice[1, 9:11]                   # trees find the text: not a consistent one
    text = target_forward(target, text.tokens)
    places = [(0, 3), (0, 4), (0, 5), (1, 9), (1, 10), (1, 11)]    # row, root slot
    plain = [plain_tree(target, each, text, *place, shape) for each in (head, moved(head, target)) for place in places]
    tree, prefix, choice, log_prob = zip(*plain)
    tree, choice, log_prob = Tree(*map(torch.cat, zip(*tree))), torch.cat(choice), torch.cat(log_prob)
    length, row = (torch.cat(x) for x in list(zip(*prefix))[1:])
    inner, nodes, forward = torch.zeros_like(choice).scatter(1, tree.parents, 1).bool(), [], target.forward
    monkeypatch.setattr(target, "forward", lambda *x, **y: nodes.append(x[0].numel()) or forward(*x, **y))
    for prefix, m in (Prefix(text.kv, length, row), 1), (Prefix(text.kv, length[:6:3], row[:6:3]), 3):
        found, found_log_prob = score_inner_nodes(target, tree, prefix, neighbours=m)
        torch.testing.assert_close(found_log_prob, log_prob)
        assert torch.equal(found[inner], choice[inner])
    assert nodes[1] < nodes[0] < choice.numel() and len(set(inner.sum(1).tolist())) > 1


def test_gradient_of_a_rollout_equals_plain_trees():
    """Eq. 3-12 with every tree drafted and scored by itself; a second step learns from the same trees."""
    target, head = tiny_models(seed=3)
    text, shape, reference = text_of(target), TreeShape.parse(CONFIG.tree), moved(head, target)
    batch = batch_of(CONFIG, target, head, reference, text)
    found = []
    for _ in range(2):
        loss, metrics = gto_objective(batch)
        found.append((loss, *torch.autograd.grad(loss, list(head.parameters()), allow_unused=True)))
    gains, ratios, lengths = [], [], []
    for b, row in enumerate(batch.roots.flatten(1).tolist()):
        for root in row:
            rewards = []
            for each in (reference, head):
                tree, _, choice, log_prob = plain_tree(target, each, text, b, root, shape)
                rewards.append(tree_reward(log_prob, tree.parents, tree.mask)[2])
            path, length, _ = accept(tree, choice, shape.depth + 1)
            tokens = tree.tokens[0, path[0, 1:length + 1]]
            chain = F.pad(tokens, (0, shape.depth - len(tokens)))[None, None, None]
            alone = SimpleNamespace(features=text.features[b:b + 1], tokens=text.tokens[b:b + 1])
            found_tree = Trees(None, chain, length[None, None])
            log_q, log_q0 = (sequence_log_prob(each, alone, torch.tensor([[[root]]]), found_tree)
                             for each in (head, reference))
            gains.append(debias(rewards[1], rewards[0])), lengths.append(length)
            ratios.append(ratio(log_q, log_q0.detach(), length).flatten())
    K, m = CONFIG.groups, CONFIG.group_size
    advantage = advantages(torch.cat(gains).view(2, K, m), CONFIG.delta)
    loss = surrogate(torch.cat(ratios).view(2, K, m), advantage, CONFIG.eps)
    expected = (loss, *torch.autograd.grad(loss, list(head.parameters()), allow_unused=True))
    for step in found:
        for x, y in zip(step, expected, strict=True):
            assert (x is None) == (y is None) and (x is None or torch.allclose(x, y, atol=1e-5))
    assert metrics["accepted"] == torch.cat(lengths).float().mean() > 0 and expected[1].abs().max() > 1e-3


def test_groups_are_adjacent_and_do_not_overlap():
    supervised = torch.ones(3, 100, dtype=torch.bool)
    supervised[1, 30:60] = False
    supervised[2, 6:] = False                                      # no room for a group
    for seed in range(50):
        roots, valid = sample_groups(supervised, 6, 8, 5, torch.Generator().manual_seed(seed))
        assert valid.sum(1).tolist()[::2] == [6, 0] and valid[1].sum() >= 4
        for b in range(2):
            slots = roots[b, valid[b]]
            assert (slots.diff(dim=1) == 1).all() and slots.flatten().unique().numel() == slots.numel()
            assert slots.min() >= 0 and slots.max() + 1 + 5 < 100
            assert supervised[b, slots + 1].all() and supervised[b, slots + 2].all()


def test_training_learns_what_it_is_told():
    """Phase I on one text: the loss falls below the entropy of a uniform guess by far."""
    target, head = tiny_models(seed=6)
    text = text_of(target, rows=4, length=32)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = token_loss(*unroll_text(CONFIG, target, head, text))
        loss.backward(), optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    log_p = target.logits(text.hidden).log_softmax(-1)
    floor = -(log_p.exp() * log_p).sum(-1).mean().item()           # the labels' own entropy
    assert losses[-1] - floor < 0.35 * (losses[0] - floor)


def test_keep_objective_equals_a_loop():
    """Chains of the target's own choices, each step weighed by how likely its path survives the re-ranking's cut."""
    target, head = tiny_models(seed=7)
    config = Config(**{**vars(CONFIG), "unroll": 3})
    text = text_of(target, rows=2, length=16)
    greedy = text.choice[:, :-1]
    text.tokens[:, 1:12] = greedy[:, :11]                          # not a consistent text: the loss reads both as given
    text.supervised[:, :4] = False                                 # a question: chains begin at slot 3
    batch = batch_of(config, target, head, None, text)
    loss, _ = keep_objective(batch, threshold=-3.0, width=0.5, temperature=0.7)
    expected, steps = 0.0, 0
    for b in range(2):
        for r in range(batch.log_q.shape[1]):
            path = 0.0
            for j in range(4):
                if not batch.weight[b, r, j] or j and text.choice[b, r + 3 + j] != text.tokens[b, r + j + 4]:
                    break
                scores = (batch.log_q[b, r, j] / 0.7).log_softmax(-1)
                path += scores[batch.labels[b, r, j].argmax()].item()
                expected, steps = expected + 1 / (1 + math.exp(-(path + 3.0) / 0.5)), steps + 1
    assert loss.item() == pytest.approx(-6 * expected / batch.total[0].item(), abs=1e-3)
    assert steps > batch.log_q.shape[1] * 3


@pytest.mark.parametrize("B, N, eta", [(5, 9, 1.0), (2, 60, 0.3), (1, 130, 2.0), (2, 1, 1.0)])
def test_tree_reward_equals_enumerated_paths(B, N, eta):
    _, parents, mask = (x.cpu() for x in random_trees(B, N))
    log_prob = -torch.rand(B, N) * 3
    log_prob[:, 0] = 0
    log_prob[:, N // 2 + 1:N // 2 + 2] = float("-inf")                 # a token the target rules out
    P, L, paths = torch.ones(B, N, dtype=torch.float64), torch.zeros(B, N, dtype=torch.float64), []
    for b, parent in enumerate(parents.tolist()):
        for j in range(1, N):                                          # parents come first
            P[b, j] = P[b, parent[j]] * math.exp(log_prob[b, j])
            L[b, j] = L[b, parent[j]] + P[b, j]
        paths.append(L[b, [j for j in range(N) if j not in parent[1:]]])
    want = {"lse": [(eta * path).logsumexp(0) / eta for path in paths], "max": [path.max() for path in paths],
            "mean": [path.mean() for path in paths], "expected": P[:, 1:].sum(-1)}
    for aggregator, value in want.items():
        for x, y in zip(tree_reward(log_prob, parents, mask, aggregator, eta), (P, L, torch.as_tensor(value))):
            torch.testing.assert_close(x, y.float(), atol=1e-5, rtol=1e-5)
