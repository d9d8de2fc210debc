"""The four trainings: the target, the text it writes, the head (phase I or its continuation), the head by GTO."""
import torch
from torch.nn import functional as F

from gto import parallel
from gto.engine import Engine
from gto.head import DraftHead, HeadConfig
from gto.loss import advantages, chain_loss, debias, keep_loss, ratio, soft_labels, surrogate, token_loss
from gto.model import ModelConfig, Target
from gto.muon import Muon
from gto.objectives import candidate_loss
from gto.rollout import grow, read, sample_groups, sequence_log_prob
from gto.trainer import train
from gto.tree import TreeShape, score_temperature
from gto.verify import Sampling


def generator_for(seed, step):
    """Randomness as a function of the step alone: a resumed run draws what the uninterrupted one would have."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def optimizers_for(model, muon_lr, adam_lr):
    """Muon for the hidden matrices, AdamW for embedding, output and norms: at equal steps clearly better than AdamW."""
    named = [(muon_lr > 0 and p.dim() == 2 and "embed" not in name, p) for name, p in model.named_parameters()
             if p.requires_grad]
    hidden = [p for is_hidden, p in named if is_hidden]
    adam = torch.optim.AdamW([p for is_hidden, p in named if not is_hidden], adam_lr, (0.9, 0.95), weight_decay=0)
    return [Muon(hidden, muon_lr), adam] if hidden else [adam]


def train_target(config, corpus, out, device):
    """A target from scratch: next-token cross-entropy. On CUDA in bf16 with a compiled forward.

    Returns the Target and the seconds that it took."""
    torch.manual_seed(config.seed)
    target = Target(ModelConfig(
        vocab_size=corpus.vocab_size, layers=config.layers, dim=config.dim, heads=config.heads, kv_heads=config.kv_heads,
        head_dim=config.head_dim, ffn_dim=config.ffn_dim, max_len=4 * config.length)).init_weights().to(device)
    forward = torch.compile(target) if device == "cuda" else target
    optimizers = optimizers_for(target, config.muon_lr, config.adam_lr)

    def loss_of(step):
        batch = corpus.batch("train", step, config.target_batch * parallel.ranks(), config.length, config.seed)
        batch = batch[parallel.rank()::parallel.ranks()].to(device)                   # [B, T+1]
        hidden, *_ = forward(batch[:, :-1])
        return F.cross_entropy(target.logits(hidden).flatten(0, 1).float(), batch[:, 1:].flatten()), {}

    seconds = train("target", target, optimizers, loss_of, config.target_steps, out, device=device,
                    autocast=torch.bfloat16 if device == "cuda" else None, clip=1.0)
    return target.requires_grad_(False), seconds


@torch.no_grad()
def validation_loss(target, corpus, config, batches=8):
    """Nats per token on held-out files."""
    device = target.norm.weight.device
    losses = []
    for step in range(batches):
        batch = corpus.batch("val", step, config.target_batch, config.length, config.seed).to(device)
        hidden, *_ = target(batch[:, :-1])
        losses.append(F.cross_entropy(target.logits(hidden).flatten(0, 1).float(), batch[:, 1:].flatten()).item())
    return sum(losses) / len(losses)


def write_texts(config, target, corpus, progress):
    """Sequences [texts, length] that the target continues from the corpus; every other batch is greedy.

    A head meets the target's own text when it decodes; trained on that, it drafts much better at T=0.
    """
    torch.manual_seed(config.seed)
    texts, batch = [], min(config.text_batch, max(config.texts // 2, 1))
    for step in progress(range(config.texts // batch)):
        prompts = corpus.batch("train", step, batch, config.prompt_length, config.seed + 1)[:, :-1].tolist()
        engine = Engine(target, None, sampling=Sampling(temperature=step % 2), batch=batch, capacity=config.length)
        texts.append(torch.tensor(engine.complete(prompts, config.length - config.prompt_length)))
    return torch.cat(texts)


def new_head(config, target, texts):
    """A fresh head for this target; its draft vocabulary is the most frequent tokens of the texts, ids ascending."""
    torch.manual_seed(config.seed)
    t = target.config
    head = DraftHead(HeadConfig(
        vocab_size=t.vocab_size, draft_vocab_size=min(config.draft_vocab_size, t.vocab_size), target_dim=t.dim,
        dim=t.dim, heads=t.heads, kv_heads=t.kv_heads, head_dim=t.head_dim, ffn_dim=config.head_ffn_dim or t.ffn_dim,
        norm_eps=t.norm_eps, max_len=t.max_len), target).init_weights()
    frequency = torch.bincount(texts.flatten(), minlength=t.vocab_size)
    head.token_ids.copy_(frequency.argsort(descending=True, stable=True)[:len(head.token_ids)].sort().values)
    return head.to(target.norm.weight.device)


def unroll_text(config, head, text):
    """Training-time test over a whole batch: every slot starts a chain along the true text.

    Returns log_q, labels [B, R, J+1, V'] and weight [B, R, J+1], see `gto.loss`.
    """
    B, T = text.tokens.shape
    J = config.unroll
    slots = torch.arange(T - J - 2, device=text.tokens.device)                        # roots whose chain fits the text
    # Root slot r predicts token r+2, step j token r+2+j; the target's distribution of it stands at r+1+j.
    places = slots[:, None] + torch.arange(J + 1, device=slots.device)                # [R, J+1]
    chains = text.tokens[:, places[:, :-1] + 2]                                       # [B, R, J]
    hidden = head.unroll(text.features, text.tokens.roll(-1, dims=1), slots.expand(B, -1), chains)
    log_q = torch.log_softmax(head.logits(hidden).float(), dim=-1)                    # [B, R, J+1, V']
    labels, teachable = soft_labels(text.logits, head.token_ids, config.label_temperature)
    return log_q, labels[:, places + 1], teachable[:, places + 1] & learnt_places(text.supervised, J)


def learnt_places(supervised, unroll):
    """Which steps of which chains are learnt, [B, T] -> [B, R, J+1] bool: the root and all tokens from it to the
    predicted one are supervised. So it is in decoding, where a draft never begins in a question."""
    slots = torch.arange(supervised.shape[1] - unroll - 2, device=supervised.device)
    chain = supervised[:, slots[:, None] + torch.arange(1, unroll + 3, device=slots.device)]  # [B, R, J+2], with root
    return chain.cumprod(-1)[..., 1:].bool()


def greedy_places(text, weight):
    """The steps [B, R, J+1] bool whose chain so far is what the target itself would choose, and is learnt throughout."""
    _, R, steps = weight.shape
    own = text.logits[:, :-1].argmax(-1) == text.tokens[:, 1:]                        # [B, T-1] of token t+1
    slots = torch.arange(R, device=own.device)[:, None] + torch.arange(1, steps, device=own.device)   # [R, J]
    return (F.pad(own[:, slots], (1, 0), value=True) & weight).cumprod(-1).bool()


def train_head(name, config, target, head, texts, steps, rate, batch, seed, out, reference=None, supervised=None):
    """Token-level training of `head`; with a frozen `reference` head, phase II: L = L_token + omega * L_objective.

    texts, supervised [n, length]: token ids, and bool whether they are learnt (None: all); rate scales the learning
    rates; batch: sequences at a time, of which a step takes config.accumulate on every rank of a torchrun. Returns the
    seconds it took. Every step draws its texts and groups from `seed`.
    """
    device = str(target.norm.weight.device.type)
    supervised = torch.ones_like(texts, dtype=torch.bool) if supervised is None else supervised
    shape, size = TreeShape.parse(config.tree), config.group_size if config.objective == "gto" else 1
    parts = config.accumulate * parallel.ranks()
    if head.config.own_embedding:
        head.embed.requires_grad_(False)                                              # as a lent one
    optimizers = optimizers_for(head, rate * config.head_muon_lr, rate * config.head_lr)

    def loss_of(part):
        # All ranks draw the whole step's texts and groups, and count what there is to learn: so what the parts' losses
        # are divided by is common, and their mean is the loss of the whole, however it is cut up.
        step, index = divmod(part, config.accumulate)
        generator = generator_for(seed, step)
        rows = torch.randint(len(texts), (parts * batch,), generator=generator)
        learnt = supervised[rows]                                                     # [parts * B, T]
        total = learnt_places(learnt, config.unroll).sum((0, 1)).to(device) / parts   # [J+1]
        roots, real = sample_groups(learnt, config.groups, size, shape.levels, generator)
        groups_weight = real / (real.sum() / parts).clamp(min=1e-9)
        first = (index * parallel.ranks() + parallel.rank()) * batch
        mine = slice(first, first + batch)
        # Behind the last token to learn only the chains' ends are needed.
        width = int(learnt[mine].any(0).nonzero().max()) + 1 + config.unroll
        text = read(target, texts[rows[mine], :width].to(device, torch.long), learnt[mine, :width].to(device))
        roots, groups_weight = roots[mine].to(device), groups_weight[mine].to(device)
        unrolled = unroll_text(config, head, text)
        loss = token_loss(*unrolled, total)
        if reference is None:
            return loss, {}
        if config.objective == "gto":
            extra, figures = group_loss(config, target, head, reference, text, roots, groups_weight)
        elif config.objective in ("keep", "tv"):
            log_q, labels, weight = unrolled
            extra = (keep_loss(log_q, labels, greedy_places(text, weight)) if config.objective == "keep" else
                     chain_loss(log_q, labels, weight))
            extra, figures = extra * weight[..., 0].numel() / total[0], {}            # the mean over what is learnt
        else:
            extra, figures = candidate_loss(config, target, head, text, roots, groups_weight)
        # Its gradient comes first, so that it can be clipped alone; that of the returned loss is added to it.
        (config.omega * extra / config.accumulate).backward(retain_graph=True)
        if config.tree_clip:
            torch.nn.utils.clip_grad_norm_(head.parameters(), config.tree_clip)
        return loss, {"extra": extra, **figures}

    return train(name, head, optimizers, loss_of, steps, out, warmup=min(config.warmup, steps // 5), device=device,
                 clip=config.clip, accumulate=config.accumulate)


def group_loss(config, target, head, reference, text, roots, weight):
    """L_GTO of one batch: trees of both heads at groups of positions, eq. 3-12. Returns (loss, figures).

    roots [B, K * m] slots; weight [B, K] of each group in the mean, 0 where there is none.
    """
    shape, temperature = TreeShape.parse(config.tree), score_temperature(1.0)
    trees, reference_trees = (grow(target, h, text, roots, shape, temperature, config.aggregator, config.eta)
                              for h in (head, reference))
    log_q = sequence_log_prob(head, text, roots, trees)                               # [B, K * m], with gradient
    with torch.no_grad():
        reference_log_q = sequence_log_prob(reference, text, roots, trees)
    in_groups = (*weight.shape, config.group_size)
    reward = debias(trees.reward, reference_trees.reward) if config.debias else trees.reward
    advantage = advantages(reward.view(in_groups), config.delta)                      # [B, K, m]
    s = ratio(log_q, reference_log_q, trees.length).view(in_groups)
    weight = weight[..., None] * weight.numel()                                       # `surrogate` is linear in A
    return surrogate(s, advantage * weight, config.eps), {
        figure: (value.view(in_groups) * weight).mean()
        for figure, value in {"reward": trees.reward, "gain": reward, "accepted": trees.length}.items()}


def copy_of(head, target):
    """A head to go on training from."""
    student = DraftHead(head.config, target).to(target.norm.weight.device)
    student.load_state_dict(head.state_dict())
    return student
