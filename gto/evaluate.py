"""Acceptance length and speed, measured the same way for every method."""
import time

import torch
from tqdm import tqdm

from gto.engine import Engine
from gto.verify import Sampling


def acceptance(target, head, prompts, shape, temperature, new_tokens, batch=16, score_temp=None, seed=0):
    """Decode all prompts, `batch` at a time.

    Returns tau [prompts]: tokens emitted per draft-verify cycle, the bonus token counted, by prompt;
            outputs: the first `new_tokens` tokens of each.
    """
    torch.manual_seed(seed)
    taus, outputs = [], []
    for start in range(0, len(prompts), batch):
        part = prompts[start:start + batch]
        capacity = max(map(len, part)) + new_tokens + shape.levels + 1
        engine = Engine(target, head, shape, Sampling(temperature), len(part), capacity, score_temp)
        rows, cycles, emitted = [[token] for token in engine.prefill(part)], [0] * len(part), [0] * len(part)
        stream = engine.cycles()
        while any(len(row) < new_tokens for row in rows):
            for b, tokens in enumerate(next(stream)):
                if len(rows[b]) < new_tokens:
                    rows[b] += tokens
                    cycles[b] += 1
                    emitted[b] += len(tokens)
        taus += [n / max(c, 1) for n, c in zip(emitted, cycles)]
        outputs += [row[:new_tokens] for row in rows]
    return torch.tensor(taus), outputs


def timed(engine, prompt, new_tokens, stop=()):
    """Decode one prompt until `new_tokens` tokens are there, or one of `stop`.

    Returns the seconds of every cycle, until its tokens are on the host and without the prefill; all tokens; and the
    drafts accepted in every cycle. The last cycle counts in full, whatever it overshoots: time and tokens must match.
    """
    new = engine.prefill([prompt])
    out, accepted, cycles = list(new), [], engine.cycles()
    synchronize(engine.device)
    times = [time.perf_counter()]
    while len(out) < new_tokens and not any(token in stop for token in new):
        new = next(cycles)[0]
        out += new
        accepted.append(len(new) - 1)
        times.append(time.perf_counter())
    synchronize(engine.device)                         # a GPU has begun a cycle more; it must not disturb what follows
    return [end - start for start, end in zip(times, times[1:])], out, accepted


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def speeds(engines, prompts, new_tokens, desc="speed"):
    """Tokens per second of several engines (batch 1), {name: [tokens/s by prompt]}, prompt by prompt in turn, so that
    a machine that slows down slows all of them."""
    result = {name: [] for name in engines}
    for i, prompt in enumerate(tqdm(prompts[:1] + prompts, desc=desc, unit="prompt")):  # the first is the warm-up
        for name, engine in engines.items():
            seconds, tokens, _ = timed(engine, prompt, new_tokens)
            if i:
                result[name].append((len(tokens) - 1) / sum(seconds))
    return {name: torch.tensor(values) for name, values in result.items()}


def paired(a, b):
    """Mean and standard error of a - b over prompts: both decode the same ones, so their common difficulty cancels."""
    difference = a - b
    return difference.mean().item(), (difference.std() / len(difference) ** 0.5).item()
