"""Learning to Draft on this machine: record, measure, learn, and a table beside every simpler way to choose.

About four minutes on two quiet CPU cores for two heads, most of it for the table.
"""
import itertools
import time

import torch
from tqdm import tqdm

from gto.adaptive import AdaptiveEngine
from gto.data import PROMPT
from gto.engine import Engine, one_thread_on_cpu
from gto.evaluate import paired, timed
from gto.policy import Learned, Rule, Space, beside, mlp, observe, save_policy
from gto.ppo import ppo
from gto.replay import Depth, Recording, Size, best_fixed, decide, fit_rule, measure, oracle, record, replay, walk
from gto.trainer import append_log
from gto.tree import TreeShape
from gto.verify import Sampling

# On a CPU small trees win, or none: one token alone is much cheaper than two. On a GPU dozens of nodes cost little.
SPACES = {"cpu": Space(2, 8, (0, 1, 2, 3, 4, 6, 8, 12, 16)), "cuda": Space(10, 8, (8, 16, 24, 32, 48, 64, 96, 128))}
HIDDEN = {"cpu": 128, "cuda": 1024}       # the paper's 1024 trains for minutes instead of 20 seconds on a CPU
TRAIN, VALIDATE = 64, 16                  # training texts to record, texts to choose by
STEPS, ROUNDS = 30_000, 2                 # of each policy in each round; the paper trains 1.1 M steps
GAMMA = {"depth": 0.999, "size": 0.9}     # the paper's; a size is the only decision of its episode
LIVE = {0.0: 16, 1.0: 8}                  # held-out prompts decoded for the clock, by temperature; all are replayed


def learn(recording, costs, space, hidden, rate, seed, progress=lambda updates: updates):
    """PPO: each policy alone (sizes with any depth, depths with a middling size), then in turn against each other.

    rate: tokens a second to beat. Returns a Learned policy.
    """
    torch.manual_seed(seed)
    R, levels, width = recording.seen.shape
    policy = Learned(space, hidden)
    depth_critic, size_critic = (mlp(width, hidden, hidden // 4, 1) for _ in range(2))
    level_of, size_of = None, torch.full((R, levels), len(space.sizes) // 2)
    for turn in range(1 + ROUNDS):
        sizes = Size(level_of, recording, costs, rate)
        ppo(sizes, policy.size_actor, size_critic, STEPS, GAMMA["size"], progress)
        if turn:
            size_of = sizes_chosen(policy, recording)
        depths = Depth(size_of, recording, costs, rate)
        ppo(depths, policy.depth_actor, depth_critic, STEPS, GAMMA["depth"], progress)
        with torch.no_grad():
            level_of, _ = decide(policy, recording)
    return policy


@torch.no_grad()
def sizes_chosen(policy, recording):
    """[R, levels]: the size it would choose, had one stopped at each level."""
    return torch.stack([policy.size(seen) for seen in recording.seen.unbind(1)], dim=1)


def part(recording, start, stop):
    """The recording of texts `start` to `stop` - 1."""
    n = recording.places
    return Recording(n, *(x[start * n:stop * n] for x in recording[1:]))


@torch.no_grad()
def run(config, target, heads, corpus, out):
    """heads {name: head of out/<name>.pt} -> Markdown, also in out/ltd.md; leaves out/policy-<name>.pt for decode.py
    --adaptive."""
    device = target.norm.weight.device.type
    one_thread_on_cpu(device)
    space, places = SPACES[device], config.eval_tokens
    training = corpus.batch("train", 0, TRAIN + VALIDATE, PROMPT - 1, config.seed + 2).tolist()
    held_out = [ids for ids in corpus.prompt_ids(config.eval_prompts) if len(ids) == PROMPT]  # side by side: of a length
    machine = measure(target, next(iter(heads.values())), space, training[:8], PROMPT + places)
    costs = {"best fixed": machine, "rule": asking(machine, Rule(space, machine, 1.0)),
             "LTD": asking(machine, Learned(space, HIDDEN[device]))}
    lines, pictures, methods = [], [], {}
    for name, head in heads.items():
        seen = record(target, head, training, places, space, progress=bar(f"record {name}"))
        held = record(target, head, held_out, places, space, progress=bar("record held-out"))
        train, validation = part(seen, 0, TRAIN), part(seen, TRAIN, TRAIN + VALIDATE)
        fixed, rate = best_fixed(train, machine, space)
        with torch.enable_grad():
            learned = learn(train, costs["LTD"], space, HIDDEN[device], rate, config.seed, bar(f"PPO {name}"))
        rule = fit_rule(train, costs["rule"], space, rate)
        speed = {key: replay(validation, costs[key], policy)[0] for key, policy in (("LTD", learned), ("rule", rule))}
        chosen = max(speed, key=speed.get)
        save_policy(beside(out / f"{name}.pt"), learned, costs["rule"], rule.rate, chosen.lower())
        methods[name] = head, {"best fixed": fixed, "rule": rule, "LTD": learned}, held
        pictures.append(picture(name, learned, held, machine))
        lines.append(f"{name}: on {VALIDATE} other training texts the learned policy replays at {speed['LTD']:.0f}"
                     f" tokens/s, the rule at {speed['rule']:.0f}: `decode.py --adaptive` uses the faster one.")
    tables = live_table(config, target, methods, costs, held_out, out)
    text = "\n\n".join([cost_table(space, machine), "\n".join(lines), tables, *pictures])
    (out / "ltd.md").write_text(text + "\n")
    return text


def bar(name):
    return lambda parts: tqdm(parts, desc=name, leave=False)


def cost_table(space, costs):
    columns = "".join(f" {level} |" for level in range(1, space.levels + 1)), "".join(f" {n} |" for n in space.sizes)
    lines = [f"This machine: milliseconds to draft a tree of {space.branch} children to each level, and to verify so"
             " many nodes, by context in tokens.\n"]
    for title, header, table in ("levels", columns[0], costs.draft), ("nodes", columns[1], costs.verify[:, -1]):
        lines += [f"| context, {title} |{header}", "|---|" + "---|" * table.shape[1]]
        lines += [f"| {b * costs.STEP}+ |" + "".join(f" {x * 1e3:.2f} |" for x in row)
                  for b, row in enumerate(table.tolist())]
        lines.append("")
    return "\n".join(lines[:-1])


@torch.inference_mode()                    # as in decoding
def thinking(policy, repeats=200):
    """Seconds that a policy takes for a draft of 1, 2, .. levels, medians: [levels]. It observes every level, is asked
    after each but the last whether to stop, and once for the size."""
    space, times = policy.space, []
    scores = [torch.rand(1, space.branch ** min(level, 2)).log() for level in range(1, space.levels)]
    length = torch.tensor([100])
    for _ in range(repeats):
        stamps = [time.perf_counter()]
        seen = observe(scores, length, space)
        stamps.append(time.perf_counter())
        bool(policy.stop(seen))
        stamps.append(time.perf_counter())
        int(policy.size(seen))
        stamps.append(time.perf_counter())
        times.append([b - a for a, b in zip(stamps, stamps[1:])])
    observing, stopping, sizing = torch.tensor(times).median(0).values
    levels = torch.arange(1, space.levels + 1)
    return levels * observing + levels.clamp(max=space.levels - 1) * stopping + sizing


def asking(costs, policy):
    """Costs that count the policy's own time."""
    return costs._replace(draft=costs.draft + thinking(policy))


def live(engines, prompts, new_tokens):
    """Batch 1, prompt by prompt in turn. -> {name: (tokens, seconds, cycles), [prompts] each}."""
    results = {name: [] for name in engines}
    for i, prompt in enumerate(prompts[:1] + prompts):                                # the first is the warm-up
        for name, engine in engines.items():
            if isinstance(engine, AdaptiveEngine) and i == 1:
                engine.decisions.clear()
            times, tokens, _ = timed(engine, prompt, new_tokens)
            results[name].append((len(tokens) - 1, sum(times), len(times)))
    return {name: torch.tensor(rows[1:]).T for name, rows in results.items()}


def engines_of(config, target, head, policies, sampling, fixed):
    """Everything that is compared, by name. fixed: the TreeShape of the policy "best fixed"."""
    capacity = PROMPT + config.eval_tokens + 16
    default = TreeShape.default(target.norm.weight.device)
    trees = {f"default tree {default}": default, f"tree {config.tree}": TreeShape.parse(config.tree), "best fixed": fixed}
    return {"plain": Engine(target, None, None, sampling, capacity=capacity),
            **{name: Engine(target, head, shape, sampling, capacity=capacity) for name, shape in trees.items()},
            **{name: AdaptiveEngine(target, head, policies[name], sampling, capacity) for name in ("rule", "LTD")}}


def live_table(config, target, methods, costs, held_out, out):
    """methods {head name: (head, {name: policy}, recording of the held-out prompts)}; costs by name -> Markdown."""
    places, notes = config.eval_tokens, []
    lines = [f"Batch 1, {LIVE[0.0]} held-out prompts at T=0 and {LIVE[1.0]} at T=1 x {places} tokens, prefill"
             " left out, everything in turn in one run; over best fixed: mean of the prompts ± standard error."
             f" Replayed: {len(held_out)} held-out prompts at T=0.\n",
             "| T | head | | tau | tokens/s | over best fixed, % | replayed |", "|---|---|---|---|---|---|---|"]
    for temperature, (name, (head, policies, held)) in itertools.product((0.0, 1.0), methods.items()):
        level, size, space = policies["best fixed"].level, policies["best fixed"].choice, policies["LTD"].space
        fixed = TreeShape(space.branch, level, space.nodes(level, size))
        engines = engines_of(config, target, head, policies, Sampling(temperature), fixed)
        results = live(engines, held_out[:LIVE[temperature]], places)
        speed = {key: tokens / took for key, (tokens, took, _) in results.items()}    # [prompts]
        for key, (tokens, took, cycles) in results.items():
            gain, error = paired(100 * speed[key] / speed["best fixed"], torch.full_like(speed[key], 100.0))
            rate, tau = (tokens.sum() / took.sum()).item(), (tokens.sum() / cycles.sum()).item()
            replayed = None
            if temperature == 0 and key in policies:
                replayed = replay(held, costs[key], policies[key])[0]
                notes.append(check(name, key, replay(part(held, 0, LIVE[0.0]), costs[key], policies[key]), rate, tau))
            lines.append(f"| {temperature:g} | {name} | {key}{f' {fixed}' if key == 'best fixed' else ''} | {tau:.2f} |"
                         f" {rate:.0f} | {gain:+.1f} ± {error:.1f} | {f'{replayed:.0f}' if replayed else ''} |")
            append_log(out / "log.jsonl", table="ltd", T=temperature, head=name, method=key, tau=tau, tokens_per_s=rate,
                       over_fixed=gain, error=error, replayed=replayed)
        if temperature == 0:
            machine = costs["best fixed"]
            best, tau, _ = walk(held, machine, *oracle(held, machine))
            lines.append(f"| 0 | {name} | oracle | {tau:.2f} | | | {best:.0f} |")
            notes.append(overhead(name, engines["LTD"], results["LTD"]))
    return "\n".join([*lines, "", *notes])


def check(head, method, replayed, rate, tau):
    """Does the replay tell the truth? On the prompts decoded live."""
    return (f"{head}, {method}: replayed {replayed[0]:.0f} tokens/s, tau {replayed[1]:.3f}; live {rate:.0f}, {tau:.3f}"
            f" (error of the replay {100 * (replayed[0] / rate - 1):+.1f} %).")


def overhead(head, engine, result):
    levels = torch.tensor([level for level, _, _ in engine.decisions])
    cost = thinking(engine.policy)[levels - 1].mean() / (result[1].sum() / result[2].sum())
    return f"{head}: the policies take {100 * cost:.1f} % of the time ({levels.float().mean():.1f} questions a cycle)."


def picture(name, policy, recording, costs):
    """Text histogram of what the policy chooses, by what it could not know: how many drafts the largest tree gets."""
    level, size = decide(policy, recording)
    _, _, visited = walk(recording, costs, level, size)
    space = policy.space
    possible, level, size = recording.accepted[visited, -1, -1], level[visited] + 1, size[visited]
    nodes = torch.tensor([space.nodes(d, s) for d, s in zip(level.tolist(), size.tolist())], dtype=torch.float)
    lines = [f"What the policies for {name} choose on held-out prompts; a bar for each number of levels, 1 to"
             f" {space.levels}.\n",
             "    drafts possible   cycles   levels     mean   nodes, mean"]
    for low, high in ((0, 0), (1, 1), (2, 3), (4, 5), (6, space.levels)):
        here = (possible >= low) & (possible <= high)
        if here.any():
            share = torch.bincount(level[here], minlength=space.levels + 1)[1:] / here.sum()
            bars = "".join(" ▁▂▃▄▅▆▇█"[round(x * 8 + 0.3)] for x in share.tolist())
            drafts, cycles = f"{low}-{high}" if high > low else low, 100 * here.float().mean()
            lines.append(f"    {drafts:>15} {cycles:6.0f} %   {bars:<10} {level[here].float().mean():4.1f}"
                         f" {nodes[here].mean():13.1f}")
    return "\n".join(lines)
