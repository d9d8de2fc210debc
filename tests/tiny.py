"""Models small enough to check by hand, with random weights; programs run in the tests' own process."""
import sys

import pytest
import torch

from gto.head import DraftHead, HeadConfig
from gto.model import ModelConfig, Target


def tiny_models(seed=0, vocab=29, draft_vocab=None, layers=3, spread=0.4):
    """A random target and head. `spread` is the size of the weights: larger ones give peaked distributions."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=vocab, dim=24, heads=4, kv_heads=2, head_dim=8, ffn_dim=32, max_len=256)
    target = Target(ModelConfig(layers=layers, **shape))
    head = DraftHead(HeadConfig(draft_vocab_size=draft_vocab or vocab, target_dim=24, **shape), target)
    for p in (*target.parameters(), *head.parameters()):
        torch.nn.init.normal_(p, std=spread) if p.dim() == 2 else torch.nn.init.uniform_(p, 0.5, 1.5)
    head.token_ids.copy_(torch.randperm(vocab)[:len(head.token_ids)].sort().values)
    return target.requires_grad_(False), head


def tiny_prompts(count, vocab=29, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (count,), generator=generator)
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


def run_here(program, *arguments, cwd, device=("--device", "cpu")):
    """`python program.py arguments` in this process: importing torch anew takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, arguments), *device])
        program.main()
