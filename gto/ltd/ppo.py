"""The learned policy, two small networks that answer what gto/policy.py asks; and how they learn from a recording, by
proximal policy optimisation (PPO, Schulman et al., arXiv 1707.06347).

An episode is a cycle, its reward its tokens minus what its time is worth at `rate` tokens a second: at the best speed
the best policy's mean is 0, others' below. (The paper's, a cycle's throughput, weighs short cycles like long ones.)"""
from dataclasses import asdict
from functools import partial

import torch
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional as F
from tqdm import tqdm

from gto.checkpoint import read, save
from gto.ltd.replay import decide, replay
from gto.policy import Fixed, Space
from gto.util import reading

ROUNDS, UPDATES, BUFFER = 3, 14, 2048      # rounds of both policies, updates a round, decisions an update; paper: 1.1 M
MINIBATCH, EPOCHS, ENTROPY, LEARNING_RATE = 256, 20, 0.01, 1e-3                       # the paper's
CLIP, VALUE_WEIGHT, MAX_NORM = 0.2, 0.5, 0.5                                          # usual values


def mlp(*widths):
    layers = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Learned(nn.Module):
    """Both actors see `observe`. hidden: width of the hidden layer; the size actor has a second, a quarter as wide."""
    waits, learn = Fixed.waits, Fixed.learn

    def __init__(self, space, hidden):
        super().__init__()
        self.space, self.hidden, self.width = space, hidden, 2 + space.top_k + space.sizes[-1]
        self.depth_actor = mlp(self.width, hidden, 2)                                 # go on, stop
        self.size_actor = mlp(self.width, hidden, hidden // 4, len(space.sizes))

    def stop(self, observation):
        return self.depth_actor(observation).argmax(-1) == 1

    def size(self, observation):
        return self.size_actor(observation).argmax(-1)


def save_policy(path, policy, gain):
    """gain: how much faster than the rule a Learned policy has proved to be, as a share."""
    save(path, kind="policy", space=asdict(policy.space), hidden=policy.hidden, gain=gain, model=policy.state_dict())


def load_policy(path):
    """-> a Learned policy, on the CPU, where it is asked; its gain over the rule."""
    contents = read(path, "policy")
    with reading(path):
        policy = Learned(Space(**contents["space"]), contents["hidden"])
        policy.load_state_dict(contents["model"])
        return policy.requires_grad_(False), float(contents["gain"])


def learn(policy, recording, costs, rate):
    """Train a Learned policy in place: sizes for drafts of any depth, depths for these sizes, and on in turn."""
    observation, reward = recording.observation, recording.accepted + 1 - rate * costs
    level, roots = torch.randint(reward.shape[1], (len(reward),)), torch.arange(len(reward))
    for _ in range(ROUNDS):
        ppo(partial(choose_sizes, observation[roots], reward[roots], level[roots]), policy.size_actor)
        size = policy.size(observation)                                               # [R, levels]
        ppo(partial(choose_depths, observation[roots], reward[roots], size[roots]), policy.depth_actor)
        level, size = decide(policy, recording)
        roots = replay(recording, costs, level, size).roots                           # where this policy comes by


def choose_sizes(observation, reward, level, actor):
    """Episodes for `ppo`: the draft of a random root r stopped at level[r], the action is the size."""
    root = torch.randint(len(reward), (BUFFER,))
    seen = observation[root, level[root]]                                             # [N, width]
    size = Categorical(logits=actor(seen)).sample()
    return seen, size, reward[root, level[root], size]


def choose_depths(observation, reward, size, actor):
    """Episodes for `ppo`: after each level but the last, 0 drafts on, 1 stops and verifies size[r, level]."""
    root, levels = torch.randint(len(reward), (BUFFER // 4,)), torch.arange(reward.shape[1])
    seen = observation[root]                                                          # [N, levels, width]
    action = Categorical(logits=actor(seen)).sample()                                 # [N, levels]
    action[:, -1] = 1
    stop = action.argmax(1)                                                           # the first 1
    asked = (levels <= stop[:, None]) & (levels < levels[-1])
    returns = reward[root, stop, size[root, stop]][:, None].expand_as(action)
    return seen[asked], action[asked], returns[asked]


def ppo(episodes, actor):
    """Train `actor`, an mlp from observations to action logits, in place.
    episodes(actor) -> what it saw [M, width], what it did [M], what it got for that [M]."""
    critic = mlp(actor[0].in_features, actor[0].out_features, actor[0].out_features // 4, 1)
    parameters = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, eps=1e-5)
    for update in tqdm(range(UPDATES), desc="PPO", leave=False):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - update / UPDATES)
        seen, action, returns = episodes(actor)
        with torch.no_grad():
            log_p = Categorical(logits=actor(seen)).log_prob(action)
            advantage = returns - critic(seen).squeeze(-1)
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(seen)).split(MINIBATCH):
                chosen = Categorical(logits=actor(seen[rows]))
                ratio = (chosen.log_prob(action[rows]) - log_p[rows]).exp()
                gain = torch.minimum(ratio * advantage[rows], ratio.clamp(1 - CLIP, 1 + CLIP) * advantage[rows]).mean()
                error = F.mse_loss(critic(seen[rows]).squeeze(-1), returns[rows])
                (VALUE_WEIGHT * error - gain - ENTROPY * chosen.entropy().mean()).backward()
                torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()
