"""The learned policy, two small networks that answer what gto/policy.py asks; and how they learn from recordings, by
proximal policy optimisation (PPO, Schulman et al., arXiv 1707.06347).

An episode is a cycle, its reward its tokens minus what its time is worth at the speed that the policy has come to: at
the best speed the best policy's mean is 0, others' below. (The paper's, a cycle's throughput, weighs short cycles like
long ones.) A recording knows what every action would have brought. So nothing is sampled, and no critic is needed."""
from dataclasses import asdict
from functools import cached_property
from operator import mul

import torch
from torch import nn
from tqdm import tqdm

from gto.checkpoint import read, save
from gto.ltd.replay import decide, replay
from gto.policy import FIRST, Fixed, Space
from gto.util import reading

UPDATES, BUFFER, EVERY = 150, 2048, 10     # updates, of as many cycles; updates between looks at the speed
MINIBATCH, EPOCHS, LEARNING_RATE = 256, 8, 4e-3
ENTROPY, CLIP, MAX_NORM = 0.01, 0.2, 0.5                                              # the paper's, usual values


class Learned(nn.Module):
    """Both actors see `observe`. The first is asked often: 16 hidden units (the paper: 1024) do as well."""
    learn = Fixed.learn

    def __init__(self, space, hidden=16):
        super().__init__()
        self.space, self.width = space, FIRST + space.top_k + space.sizes[-1]
        self.depth_actor = nn.Sequential(nn.Linear(self.width, hidden), nn.ReLU(), nn.Linear(hidden, 2))  # go on, stop
        self.size_actor = nn.Sequential(nn.Linear(self.width, 4 * hidden), nn.ReLU(), nn.Linear(4 * hidden, hidden),
                                        nn.ReLU(), nn.Linear(hidden, len(space.sizes)))

    @cached_property                                              # for one that no longer learns
    def numbers(self):
        return [p.tolist() for p in self.depth_actor.parameters()]

    def stop(self, seen):
        if torch.is_tensor(seen):
            return self.depth_actor(seen).argmax(-1) == 1
        weight, bias, last, last_bias = self.numbers                                  # one: plain Python, see `observe`
        hidden = [max(sum(map(mul, row, seen)) + b, 0.0) for row, b in zip(weight, bias)]
        go_on, stop = (sum(map(mul, row, hidden)) + b for row, b in zip(last, last_bias))
        return stop > go_on

    def size(self, seen):
        return self.size_actor(torch.as_tensor(seen)).argmax(-1)

    def forward(self, seen):
        """[.., width] -> log-probabilities of the actions: go on, stop [.., 2]; sizes [.., sizes]."""
        return self.depth_actor(seen).log_softmax(-1), self.size_actor(seen).log_softmax(-1)


def save_policy(path, policy, gain):
    """gain: how much faster than the rule a Learned policy has proved to be, as a share."""
    save(path, kind="policy", space=asdict(policy.space), gain=gain, model=policy.state_dict())


def load_policy(path):
    """-> a Learned policy, on the CPU, where it is asked; its gain over the rule."""
    contents = read(path, "policy")
    with reading(path):
        policy = Learned(Space(**contents["space"]))
        policy.load_state_dict(contents["model"])
        return policy.requires_grad_(False), float(contents["gain"])


def learn(policy, recordings, seconds):
    """Train a Learned policy in place. seconds [levels, sizes] of a cycle. Time in each recording has its own worth:
    text at T=1 is slower to write than at T=0."""
    every = policy.space.every
    seen, accepted = (torch.cat(x)[:, ::every] for x in zip(*(part[1:] for part in recordings)))  # [R, asked, ..]
    optimizer = torch.optim.Adam(policy.parameters(), eps=1e-5)
    for update in tqdm(range(UPDATES), desc="PPO", leave=False):
        if update % EVERY == 0:
            speeds = [replay(part, seconds, *decide(policy, part)).rate for part in recordings]
            rate = torch.cat([torch.full((len(part.accepted), 1, 1), max(speed, 1 / seconds[0, 0]))
                              for part, speed in zip(recordings, speeds)])            # or that of plain decoding
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - update / UPDATES)
        roots = torch.randint(len(seen), (BUFFER,))
        ppo(policy, optimizer, seen[roots], accepted[roots] + 1 - rate[roots] * seconds[::every])


def advantages(log_p, reward):
    """What each action brings beyond what the policy expects, if it goes on as it does. log_p: see `Learned`; reward
    [n, levels, sizes] of a cycle that ends there -> [n, levels, 2], [n, levels, sizes]."""
    worth = (log_p[1].exp() * reward).sum(-1)                                         # [n, levels] of stopping there
    ahead, depth = worth[:, -1], torch.zeros_like(log_p[0])
    for level in reversed(range(reward.shape[1] - 1)):                                # at the last nobody asks
        actions = torch.stack([ahead, worth[:, level]], dim=-1)                       # [n, 2]
        ahead = (log_p[0][:, level].exp() * actions).sum(-1)
        depth[:, level] = actions - ahead[:, None]
    return depth, reward - worth[..., None]


def ppo(policy, optimizer, seen, reward):
    """One update from the cycles seen [n, levels, width], reward [n, levels, sizes], several times over."""
    with torch.no_grad():
        before = policy(seen)
        advantage = [each / (each.std() + 1e-8) for each in advantages(before, reward)]
    for rows in (rows for _ in range(EPOCHS) for rows in torch.randperm(len(seen)).split(MINIBATCH)):
        loss = 0.0
        for now, old, gain in zip(policy(seen[rows]), before, advantage):
            ratio, p, gain = (now - old[rows]).exp(), old[rows].exp(), gain[rows]
            clipped = torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain)
            loss -= (p * clipped).sum(-1).mean() - ENTROPY * (now.exp() * now).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
