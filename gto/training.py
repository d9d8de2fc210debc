"""The trainings: the target, the text it writes, the draft head (phase I), and what goes on from it (phase II)."""
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from tqdm import tqdm

from gto.checkpoint import finish, read, save
from gto.engine import Engine
from gto.head import DraftHead, HeadConfig
from gto.loss import Batch, learnt_positions, token_loss, unroll_text
from gto.model import ModelConfig, Target, small_normal
from gto.rollout import Text, sample_groups, target_forward
from gto.tree import TreeShape
from gto.util import UserError, append_log, average, compute_dtype, rank, ranks, reading
from gto.verify import Sampling
from kernels import HAS_TRITON, is_modern
from kernels.muon import Muon

SAVE_EVERY = 200        # steps: a multiple of config.rollout_steps, and of the 10 that find a loss that is no number
KEPT_BYTES = 2 << 30    # of what the target makes of the texts: more is computed anew in every step


class Texts(NamedTuple):
    """What heads are trained on."""
    tokens: torch.Tensor        # [n, T]
    supervised: torch.Tensor    # [n, T] bool: tokens to learn
    seen: list                  # what the frozen target makes of each, once `see` has run


class Stage(NamedTuple):
    name: str            # of its progress bar, log lines and checkpoint
    steps: int
    batch: int           # sequences at a time, of which a step takes config.accumulate on every rank of a torchrun
    rate: float = 1.0    # learning rates relative to phase I's
    seed: int = 0        # every step draws its texts and groups from it


def train_target(config, corpus, out, device):
    """A target from scratch, saved as out/target.pt: next-token cross-entropy. In bf16, compiled, if the GPU can."""
    torch.manual_seed(config.seed)
    shape = {name: getattr(config, name) for name in ("layers", "dim", "heads", "kv_heads", "head_dim", "ffn_dim")}
    target = Target(ModelConfig(corpus.vocab_size, **shape, max_len=4 * config.length)).init_weights().to(device)
    forward = torch.compile(target) if HAS_TRITON and is_modern(torch.device(device)) else target

    def loss_of(part):
        batch = corpus.batch(part, config.target_batch * ranks(), config.length, config.seed)
        batch = batch[rank()::ranks()].to(device)                                     # [B, T+1]
        with torch.autocast("cuda", torch.bfloat16, enabled=compute_dtype(device) == torch.bfloat16):
            hidden = forward(batch[:, :-1], keep_kv=False)[0]                         # the features are not kept
            return F.cross_entropy(target.logits(hidden).flatten(0, 1).float(), batch[:, 1:].flatten()), {}

    train(Stage("target", config.target_steps, config.target_batch), target,
          optimizers_for(target, config.muon_lr, config.adam_lr), loss_of, out, accumulate=config.target_accumulate)


def write_texts(config, target, corpus):
    """Texts that the target continues from the corpus: a head that learns from its own text drafts much better at T=0.
    Every other batch is greedy. -> tokens, supervised [n, T]"""
    torch.manual_seed(config.seed)
    texts, batch = [], min(config.text_batch, max(config.texts // 2, 1))
    for step in tqdm(range(config.texts // batch), desc="text", unit="batch", disable=rank() > 0):
        prompts = corpus.batch(step, batch, config.prompt_length, config.seed + 1)[:, :-1].tolist()
        engine = Engine(target, None, sampling=Sampling(temperature=step % 2), batch=batch, capacity=config.length)
        texts.append(torch.tensor(engine.complete(prompts, config.length - config.prompt_length)))
        del engine                                                                    # before the next takes its memory
    tokens = torch.cat(texts)
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


def new_head(config, target, texts):
    """A fresh head for this target; its draft vocabulary is the texts' most frequent tokens to learn, ids ascending."""
    torch.manual_seed(config.seed)
    t = target.config
    head = small_normal(DraftHead(HeadConfig(
        t.vocab_size, 1, t.dim, t.heads, t.kv_heads, t.head_dim, config.head_ffn_dim or t.ffn_dim, t.max_len,
        t.norm_eps, draft_vocab_size=min(config.draft_vocab_size, t.vocab_size), target_dim=t.dim), target))
    frequency = torch.bincount(texts.tokens[texts.supervised], minlength=t.vocab_size)
    head.token_ids.copy_(frequency.argsort(descending=True, stable=True)[:len(head.token_ids)].sort().values)
    return head.to(target.norm.weight.device)


def copy_of(head, target):
    """A head to go on training from."""
    student = DraftHead(head.config, target).to(target.norm.weight.device)
    student.load_state_dict(head.state_dict())
    return student


def train_head(stage, config, target, head, texts, out, objective=None, reference=None):
    """Train `head` token by token and save it; with an objective of gto.loss, phase II, beside a frozen reference."""
    if head.config.own_embedding:
        head.embed.requires_grad_(False)                                              # as a lent one
    see(target, texts)
    kept = {}

    def loss_of(part):
        batch = sample_batch(part, stage, config, target, head, reference, texts, kept)
        loss = token_loss(batch.log_q, batch.labels, batch.weight, batch.total)
        if objective is None:
            return loss, {}
        extra, metrics = objective(batch)
        return loss + config.omega * extra, {"token_loss": loss, "objective": extra, **metrics}

    optimizers = optimizers_for(head, stage.rate * config.head_muon_lr, stage.rate * config.head_lr)
    train(stage, head, optimizers, loss_of, out, min(config.warmup, stage.steps // 5), config.clip, config.accumulate)


def sample_batch(part, stage, config, target, head, reference, texts, kept):
    """One part of a step: texts drawn for this rank, run through target and head. -> gto.loss.Batch.
    All ranks draw the whole step's texts and groups, by the step's number alone, and count what there is to learn: the
    mean of the parts' losses is the loss of the whole, however it is cut up."""
    device, parts = target.norm.weight.device, config.accumulate * ranks()
    step, index = divmod(part, config.accumulate)
    if step % config.rollout_steps == 0:
        kept[index] = []
    generator = torch.Generator().manual_seed(stage.seed * 1_000_003 + step)
    rows = torch.randint(len(texts.tokens), (parts * stage.batch,), generator=generator)
    supervised = texts.supervised[rows]                                               # [parts * B, T]
    total = learnt_positions(supervised, config.unroll).sum((0, 1)).to(device) / parts   # [J+1]
    roots, valid = sample_groups(supervised, config.groups, config.group_size, TreeShape.parse(config.tree).depth,
                                 generator)
    group_weight = valid / (valid.sum() / parts).clamp(min=1e-9)
    mine = (index * ranks() + rank()) * stage.batch + torch.arange(stage.batch)
    width = int(supervised[mine].any(0).nonzero().max()) + 1 + config.unroll          # the last to learn, chains' ends
    tokens, learnt = texts.tokens[rows[mine], :width].to(device, torch.long), supervised[mine, :width].to(device)
    if texts.seen:
        seen = (torch.cat(each)[:, :width] for each in zip(*(texts.seen[row] for row in rows[mine])))
        text = Text(tokens, *seen, None, learnt)
    else:
        text = target_forward(target, tokens)._replace(supervised=learnt)
    log_q, labels, weight = unroll_text(config, target, head, text)
    return Batch(config, target, head, reference, text, log_q, labels, weight, total,
                 roots[mine].to(device), group_weight[mine].to(device), kept[index])


def see(target, texts):
    """Run the frozen target over all texts and keep what heads learn from, many times, if it fits into memory: not the
    keys and values, which only rollouts need; not on several ranks, each of which meets few."""
    if texts.seen or ranks() > 1 or texts.tokens.numel() * 4 * target.norm.weight.nbytes > KEPT_BYTES:
        return
    for tokens in tqdm(texts.tokens.long(), "see", unit="text"):
        text = target_forward(target, tokens[None].to(target.norm.weight.device))
        texts.seen.append((text.features, text.hidden, text.choice))


def optimizers_for(model, muon_lr, adam_lr):
    """Muon for the hidden matrices, AdamW for embedding, output and norms: at equal steps clearly better than AdamW."""
    hidden, other = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (hidden if muon_lr > 0 and p.dim() == 2 and "embed" not in name else other).append(p)
    adam = torch.optim.AdamW(other, adam_lr, (0.9, 0.95), weight_decay=0)
    return [Muon(hidden, muon_lr), adam] if hidden else [adam]


def train(stage, model, optimizers, loss_of, out, warmup=20, clip=1.0, accumulate=1):
    """Run all optimiser steps, save the model; out/<name>.partial.pt resumes an interrupted run. UserError at a NaN.
    loss_of(part) -> (loss, {metric: value}); a step takes the mean over its `accumulate` parts, numbered on through the
    training, and over all ranks. It must be a pure function of `part`, the rank and the model, which it may keep for
    less than SAVE_EVERY steps: then runs, resumed or not, are equal bit for bit on a CPU with as many threads, else up
    to rounding. optimizers: `lr` is the peak, after `warmup` steps; clip: gradient norm."""
    name, steps, out = stage.name, stage.steps, Path(out)
    partial, start, seconds, recent = out / f"{name}.partial.pt", 0, 0.0, []
    if partial.exists():
        state = read(partial, "training")
        with reading(partial):
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            start, seconds = state["step"], state["seconds"]
    every = max(1, min(10, steps // 20))                          # in the steps between, the host waits for no GPU
    bar = tqdm(range(start, steps), name, steps, initial=start, unit="step", disable=rank() > 0)
    began = time.perf_counter() - seconds
    for step in bar:
        sums = {}
        for part in range(step * accumulate, (step + 1) * accumulate):
            loss, metrics = loss_of(part)
            (loss / accumulate).backward()
            for metric, value in {"loss": loss, **metrics}.items():
                sums[metric] = sums.get(metric, 0) + value.detach() / accumulate
        average([p.grad for p in model.parameters() if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        rate = min((step + 1) / max(warmup, 1), (steps - step) / max(steps - warmup, 1), 1.0)
        for optimizer in optimizers:                              # of one group each
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * rate
            optimizer.step()
            optimizer.zero_grad()
        weights = torch.nn.utils.get_total_norm(list(model.parameters()))
        recent.append(torch.stack([*sums.values(), norm, weights]).detach())
        if step % every == every - 1 or step == steps - 1:
            values = torch.stack(recent)                                              # [steps since, metrics]
            average([values])
            fine = values[:, [0, -1]].isfinite().all(1).tolist()
            if False in fine:
                raise UserError(f"{name}, step {step + 2 - len(fine) + fine.index(False)}: loss or weights not finite;"
                                " the last checkpoint is kept. Lower --muon-lr, of heads --head-muon-lr and --head-lr")
            recent, metrics = [], dict(zip([*sums, "norm"], values.mean(0).tolist()))
            bar.set_postfix({metric: f"{value:.3f}" for metric, value in metrics.items()})
            append_log(out / "log.jsonl", stage=name, step=step + 1, seconds=time.perf_counter() - began, **metrics)
        if step % SAVE_EVERY == SAVE_EVERY - 1 and step < steps - 1:
            save(partial, kind="training", model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers],
                 step=step + 1, seconds=time.perf_counter() - began)
    finish(name, model, out, seconds=time.perf_counter() - began)
