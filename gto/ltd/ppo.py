"""Learning both policies from a recording by proximal policy optimisation (PPO, Schulman et al., arXiv 1707.06347).

An episode is a cycle, its reward its tokens minus what its time is worth at `rate` tokens a second: at the best speed
the best policy's mean is 0, others' below. (The paper's, a cycle's throughput, weighs short cycles like long ones.)"""
from functools import partial

import torch
from torch.distributions import Categorical
from torch.nn import functional as F
from tqdm import tqdm

from gto.ltd.policy import mlp
from gto.ltd.replay import decide, replay

ROUNDS, UPDATES, BUFFER = 3, 14, 2048      # rounds of both policies, updates a round, decisions an update; paper: 1.1 M
MINIBATCH, EPOCHS, ENTROPY, LEARNING_RATE = 256, 20, 0.01, 1e-3                       # the paper's
CLIP, VALUE_WEIGHT, MAX_NORM = 0.2, 0.5, 0.5                                          # usual values


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
