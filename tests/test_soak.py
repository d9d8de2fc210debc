"""Much text, many draws, a long life: deselected by default, python -m pytest -m soak runs it."""
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gto.engine import Engine
from gto.evaluate import timed
from gto.tree import TreeShape
from gto.verify import Sampling
from tests.test_verify import draw_three, three_tokens
from tests.tiny import tiny_models, tiny_prompts

pytestmark = pytest.mark.soak


def test_a_hundred_thousand_greedy_tokens_are_those_of_plain_decoding():
    models, shape, tokens, cycles = tiny_models(seed=1, vocab=8), TreeShape(4, 3, 8), 0, 0
    for seed in range(7):
        prompts = tiny_prompts(64, vocab=8, seed=seed)
        new = list(Engine(*models, shape, batch=64).generate(prompts, 256))
        found = [sum(parts, prompt) for prompt, *parts in zip(prompts, *new)]
        assert found == Engine(models[0], None, batch=64).complete(prompts, 256)
        tokens += sum(map(len, found)) - sum(map(len, prompts))
        cycles += sum(bool(part) for parts in new for part in parts)
    assert tokens > 1e5 and cycles < 0.8 * tokens, "little was accepted: the test shows nothing"


def p_value(found, exact):
    """Of Pearson's chi-square test: how likely draws of the distribution `exact` differ from it by more than `found`.
    Outcomes expected less than five times are counted as one."""
    draws = sum(found.values())
    cells = [(found[outcome], draws * p) for outcome, p in exact.items() if draws * p >= 5]
    rare = [draws - sum(cell) for cell in zip(*cells)]
    cells += [rare] if rare[1] >= 5 else []
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    return torch.special.gammaincc(*torch.tensor([len(cells) - 1, statistic], dtype=torch.float64) / 2).item()


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=4)], ids=str)
def test_a_million_draws(sampling):
    """Half a million for either sampling, of the next three tokens, against their exact joint distribution. A perfect
    sampler fails once in a million times; one whose temperature is 2 % off always would."""
    models = tiny_models(seed=6, vocab=8)
    found, exact = draw_three(*models, sampling, 125, 4000), three_tokens(models[0], sampling)
    assert found.keys() <= exact.keys() and p_value(found, exact) > 1e-6
    assert p_value(found, three_tokens(models[0], replace(sampling, temperature=1.02 * sampling.temperature))) < 1e-20


def test_memory_stays_flat_over_200_prompts():
    """After 50 to warm up, less than 1 MiB more: caches of keys and values that stayed would be 0.1 MiB each."""
    models, resident = tiny_models(seed=2), []
    for prompt in tiny_prompts(250):
        timed(Engine(*models, TreeShape(4, 3, 8), Sampling(1.0)), prompt, 60)
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert max(resident[50:]) - resident[49] < 1 << 20
