"""Muon, the optimiser of hidden matrices: few large operations, all matrices of a shape at once."""
import torch


class Muon(torch.optim.Optimizer):
    """Momentum, its updates made orthogonal (Jordan et al., 2024). torch.optim.Muon's bfloat16 crawls on a CPU."""

    def __init__(self, params, lr=0.02, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), params in by_shape.items():
                buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                grads = [p.grad for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                update = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))   # Nesterov: a step ahead
                # An orthogonal update moves every output by about the same, whatever the shape, with this scale.
                update = orthogonalize(update) * max(1, rows / columns) ** 0.5
                torch._foreach_add_(params, list(update), alpha=-group["lr"])


def orthogonalize(updates, steps=5):
    """Push the singular values of [n, rows, columns] towards 1 (to within about 0.7 .. 1.2) by a quintic iteration."""
    x = updates.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(updates.dtype)
