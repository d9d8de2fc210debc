"""Proximal policy optimisation (Schulman et al., arXiv 1707.06347) with generalised advantages, top to bottom.

An environment runs N episodes side by side and starts ended ones anew by itself:
    env.observation [N, width]      env.step(action [N]) -> reward [N], done [N] (the episode ended with this step)
"""
import torch
from torch.nn import functional as F

from gto.trainer import learning_rate

BUFFER, MINIBATCH, EPOCHS, ENTROPY, PEAK_LR, WARMUP = 2048, 256, 20, 0.01, 1e-3, 0.01   # the paper's
CLIP, LAMBDA, VALUE_WEIGHT, MAX_NORM = 0.2, 0.95, 0.5, 0.5                              # usual values


def ppo(env, actor, critic, steps, gamma, progress=lambda updates: updates):
    """Train `actor` ([.., width] -> action logits) and `critic` ([.., width] -> [.., 1]) in place for about `steps`
    decisions.

    Returns the mean reward of each buffer, a list: the learning curve.
    """
    updates, parameters = max(1, steps // BUFFER), [*actor.parameters(), *critic.parameters()]
    optimizer, curve = torch.optim.Adam(parameters, PEAK_LR, eps=1e-5), []
    for update in progress(range(updates)):
        optimizer.param_groups[0]["lr"] = PEAK_LR * learning_rate(update, updates, WARMUP * updates)
        seen, action, log_p, reward, advantage, value = collect(env, actor, critic, gamma)
        curve.append(reward.mean().item())
        returns = advantage + value
        for _ in range(EPOCHS):
            for rows in torch.randperm(BUFFER).split(MINIBATCH):
                log_q = torch.log_softmax(actor(seen[rows]), dim=-1)                  # [M, actions]
                ratio = (log_q.gather(1, action[rows, None]).squeeze(1) - log_p[rows]).exp()
                a = advantage[rows]
                a = (a - a.mean()) / (a.std() + 1e-8)
                gain = torch.minimum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a).mean()
                entropy = -(log_q.exp() * log_q).sum(-1).mean()
                error = F.mse_loss(critic(seen[rows]).squeeze(-1), returns[rows])
                (-gain - ENTROPY * entropy + VALUE_WEIGHT * error).backward()
                torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return curve


@torch.no_grad()
def collect(env, actor, critic, gamma):
    """Experience, [BUFFER, ..] each: observations, actions, their log-probabilities, rewards, advantages, values."""
    steps, seen, actions, log_ps, rewards, going = BUFFER // len(env.observation), [], [], [], [], []
    for _ in range(steps):
        seen.append(env.observation)
        log_p = torch.log_softmax(actor(seen[-1]), dim=-1)
        actions.append(log_p.exp().multinomial(1).squeeze(1))
        log_ps.append(log_p.gather(1, actions[-1][:, None]).squeeze(1))
        reward, done = env.step(actions[-1])
        rewards.append(reward), going.append(1 - done.float())
    values = critic(torch.stack([*seen, env.observation])).squeeze(-1)                # [steps + 1, N]
    advantages, ahead = [], torch.zeros_like(rewards[0])
    for t in reversed(range(steps)):
        surprise = rewards[t] + gamma * values[t + 1] * going[t] - values[t]
        ahead = surprise + gamma * LAMBDA * going[t] * ahead
        advantages.insert(0, ahead)
    return (torch.stack(seen).flatten(0, 1), torch.cat(actions), torch.cat(log_ps), torch.cat(rewards),
            torch.cat(advantages), values[:-1].flatten())
