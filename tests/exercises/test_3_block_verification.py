"""Exercise 3: block verification of a sampled chain (Sun et al., arXiv 2403.10444, algorithm 2).

Our trees are deterministic and one draw of the target's per node verifies them (the head of gto/verify.py). A chain
whose tokens were *sampled* from draft distributions q is usually verified by rejection, token by token: accept x with
probability min(1, p(x) / q(x)), at the first rejection draw from what p exceeds q by. That is lossless but gives tokens
away: it looks at each by itself. Block verification looks at the whole chain, is lossless, too, and accepts as many
tokens on average as any rule can that knows no more. With p(x | i) and q(x | i) after i drafted tokens:

    w_0 = 1,   w_i = min(1, w_(i-1) * p(x_i | i-1) / q(x_i | i-1))                         i = 1..n
    h_i = R_i / (R_i + 1 - w_i),   R_i = sum over x of max(0, w_i p(x | i) - q(x | i))     i < n;   h_n = w_n

Position i is passed with probability h_i, independently. The *last* position passed, not the one before the first
failure, is the number of accepted tokens; 0 if none was. The next token is drawn from max(0, w_i p(. | i) - q(. | i)),
normalised, at that i < n, and from p(. | n) behind the whole chain.

To be tested exactly, the function returns probabilities instead of drawing.

Add      `block_verification(tokens, q, p)` in gto/verify.py. tokens [n] drafted; q [n, V], p [n + 1, V], float64, the
         distributions behind 0, 1, .. of them. -> stop [n + 1], the probability that exactly i tokens are accepted, and
         following [n + 1, V], the next token's distribution then (any where stop is 0, but no NaN)
Size     15 to 20 lines, with its docstring
Hint     where p equals q, h is 0 / 0: what may be taken for it?
Run      python -m pytest -m exercise tests/exercises/test_3_block_verification.py"""
import itertools
import math
from collections import Counter

import pytest
import torch

import gto.verify
from tests.exercises.task import asked_for

pytestmark = pytest.mark.exercise


def token_verification(tokens, q, p):
    """The usual rule, to compare with: the same arguments and results."""
    n, stop, reached = len(tokens), [], 1.0
    for i, x in enumerate(tokens):
        accept = min(1.0, (p[i, x] / q[i, x]).item())
        stop.append(reached * (1 - accept))
        reached *= accept
    excess = (p[:n] - q).clamp(min=0)
    excess = excess / excess.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.tensor([*stop, reached], dtype=torch.float64), torch.cat([excess, p[n:]])


def random_models(n, V, seed):
    """{prefix: distribution} of the draft and of the target. By seed they differ little, a lot, or at some prefixes not
    at all; with odd seeds some tokens cannot be drafted, or are ruled out."""
    generator = torch.Generator().manual_seed(seed)
    q, p = {}, {}
    for length in range(n + 1):
        for prefix in itertools.product(range(V), repeat=length):
            random = torch.rand(2, V, dtype=torch.float64, generator=generator)
            a, b = random * (random > 0.2 * (seed % 2)) + 0.01 * torch.eye(V)[0]
            if seed % 4 == 0:
                b = 0.9 * a + 0.1 * b
            elif seed % 4 == 3 and length % 2 == 0:
                b = a
            q[prefix], p[prefix] = a / a.sum(), b / b.sum()
    return q, p


def run(verification, q, p, n):
    """Over all chains that may be drafted: the distribution of n + 1 emitted tokens, where the target itself goes on
    behind a shorter output, and the mean number of accepted tokens."""
    V, found, accepted = len(q[()]), Counter(), 0.0
    for chain in itertools.product(range(V), repeat=n):
        drafted = math.prod(q[chain[:i]][x].item() for i, x in enumerate(chain))
        if drafted == 0:
            continue
        behind = [chain[:i] for i in range(n + 1)]
        stop, following = verification(torch.tensor(chain), torch.stack([q[prefix] for prefix in behind[:-1]]),
                                       torch.stack([p[prefix] for prefix in behind]))
        assert stop.shape == (n + 1,) and following.shape == (n + 1, V)
        assert (stop > -1e-12).all() and (following >= 0).all(), "a probability below 0, or NaN"
        assert abs(stop.sum() - 1) < 1e-9, "the numbers of accepted tokens exclude each other: they add up to 1"
        accepted += drafted * (stop * torch.arange(n + 1)).sum().item()
        for i, x in itertools.product(range(n + 1), range(V)):
            found[(*chain[:i], x)] += drafted * (stop[i] * following[i, x]).item()
    for text in [text for text in found if len(text) <= n]:
        mass = found.pop(text)
        for rest in itertools.product(range(V), repeat=n + 1 - len(text)):
            whole = text + rest
            found[whole] += mass * math.prod(p[whole[:i]][whole[i]].item() for i in range(len(text), n + 1))
    return found, accepted


@pytest.mark.parametrize("n, V", [(1, 4), (3, 3), (4, 2)])
def test_lossless_and_never_fewer_tokens(n, V):
    block_verification, gains = asked_for(gto.verify, "block_verification"), []
    for seed in range(12):
        q, p = random_models(n, V, seed)
        (found, accepted), (usual, fewer) = (run(rule, q, p, n) for rule in (block_verification, token_verification))
        for text in itertools.product(range(V), repeat=n + 1):
            exact = math.prod(p[text[:i]][text[i]].item() for i in range(n + 1))
            assert usual[text] == pytest.approx(exact, abs=1e-9)
            assert found[text] == pytest.approx(exact, abs=1e-9), f"not lossless: {text}, seed {seed}"
        assert accepted >= fewer - 1e-9, "fewer tokens than token by token"
        gains.append(accepted - fewer)
    assert n == 1 or max(gains) > 0.02, "no more tokens than token by token: is each token looked at by itself?"


def test_the_papers_example():
    """Two tokens, of which the target gives 1/3 and 2/3, the draft 2/3 and 1/3, whatever came before. Of two drafted
    tokens 10/9 are accepted token by token, 11/9 as a block."""
    prefixes = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    p = {prefix: torch.tensor([1.0, 2.0], dtype=torch.float64) / 3 for prefix in prefixes}
    q = {prefix: x.flip(0) for prefix, x in p.items()}
    block_verification = asked_for(gto.verify, "block_verification")
    assert run(token_verification, q, p, 2)[1] == pytest.approx(10 / 9)
    assert run(block_verification, q, p, 2)[1] == pytest.approx(11 / 9)
