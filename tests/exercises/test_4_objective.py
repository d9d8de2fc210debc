"""Exercise 4: an objective for phase II that is the acceptance length itself, with its exact gradient.

GTO's reward carries no gradient: it can only say which of the longest accepted paths to push, up or down. But how many
tokens of a chain are accepted on average is a smooth function of the head's probabilities: a token drawn from M and
verified against T by rejection is accepted with probability (Leviathan et al., arXiv 2211.17192, theorem 3.5)

    a = sum over x of min(T(x), M(x))

and a chain is accepted up to where the first token fails: L = a_1 + a_1 a_2 + .. + a_1 a_2 .. a_(J+1). Maximise it.
Mind what the product rule says: a step is worth improving by the chance that decoding gets there, *and* an early step
is worth more if what follows it is good. (`keep_objective` asks a similar question of the greedy path.)

Add      an objective named "overlap" to OBJECTIVES in gto/loss.py: minus the mean of L over the chains of batch.log_q,
         with T = batch.labels. A chain ends before its first step whose batch.weight is False. Divide the sum over
         chains by batch.total[0]: then parts of a step can be averaged. -> loss, {}
Size     5 to 10 lines, with its docstring
Hint     the end of `keep_objective`. Gradients through a product: torch.cumprod knows how, zeros included
Run      python -m pytest -m exercise tests/exercises/test_4_objective.py
Then     python train.py --objectives gto,overlap --label-temperature 1 --out-dir out/overlap, and look at T=1"""
from dataclasses import replace

import pytest
import torch

from gto.loss import OBJECTIVES
from tests.exercises.task import todo
from tests.test_loss import CONFIG, batch_of, text_of
from tests.tiny import tiny_models

pytestmark = pytest.mark.exercise


def overlap_of(batch):
    """Loss and its gradient with regard to log_q."""
    if "overlap" not in OBJECTIVES:
        todo("gto.loss.OBJECTIVES has no 'overlap' yet")
    log_q = batch.log_q.detach().requires_grad_()
    loss, metrics = OBJECTIVES["overlap"](batch._replace(log_q=log_q))
    assert loss.shape == () and isinstance(metrics, dict)
    return loss.detach(), *torch.autograd.grad(loss, log_q)


def by_a_loop(batch):
    log_q, accepted = batch.log_q.detach().requires_grad_(), 0.0
    for chain, labels, weight in zip(log_q.flatten(0, 1), batch.labels.flatten(0, 1), batch.weight.flatten(0, 1)):
        reached = 1.0
        for log_m, t, counts in zip(chain, labels, weight):
            if not counts:
                break
            reached = reached * torch.minimum(log_m.exp(), t).sum()
            accepted = accepted + reached
    loss = -accepted / batch.total[0]
    return loss.detach(), *torch.autograd.grad(loss, log_q)


@pytest.fixture
def batch():
    """Chains of four steps, some of which end early: in a question, or where the draft vocabulary lacks a token."""
    target, head = tiny_models(seed=7, draft_vocab=23, spread=0.2)
    text = text_of(target, rows=2, length=16)
    text.supervised[1, 6:9] = False
    batch = batch_of(replace(CONFIG, unroll=3), target, head, None, text)
    gap = batch.weight[..., 1:] & ~batch.weight[..., :-1]
    assert gap.any() and batch.weight.all(-1).any(), "the chains show nothing"
    return batch


def test_loss_and_gradient_equal_a_loop(batch):
    (loss, gradient), (want, want_gradient) = overlap_of(batch), by_a_loop(batch)
    torch.testing.assert_close(loss, want, msg=lambda text: f"the loss. {text}")
    torch.testing.assert_close(gradient, want_gradient, msg=lambda text: f"the gradient: is it all there? {text}")


def test_a_perfect_head_has_every_token_accepted(batch):
    perfect = batch._replace(log_q=batch.labels.log(), weight=torch.ones_like(batch.weight))
    chains = perfect.weight[..., 0].sum()
    torch.testing.assert_close(overlap_of(perfect._replace(total=perfect.weight.sum((0, 1))))[0], torch.tensor(-4.0))
    torch.testing.assert_close(overlap_of(perfect._replace(total=chains.expand(4) * 2))[0], torch.tensor(-2.0))
    hopeless = perfect._replace(log_q=torch.full_like(batch.log_q, -200.0))
    loss, gradient = overlap_of(hopeless)
    assert loss == 0 and gradient.isfinite().all()
