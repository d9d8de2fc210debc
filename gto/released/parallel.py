"""A target over several processes of torchrun, one on each GPU (a rank): in training, where they read different texts,
"gathered" layer by layer (FSDP2); in decoding "split" (tensor parallel), so that each reads only 1/N of the weights."""
from dataclasses import replace

import torch
from torch import distributed

from gto.model import Target
from gto.util import UserError, rank, ranks


def gather(target):
    """Leave on each rank 1/N of the layers of a target on the meta device; a layer's weights are gathered when it runs,
    then dropped. The head uses what is outside them too. All ranks must run the target equally often."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard                                    # slow to import, rarely needed
    mesh = init_device_mesh("cuda" if distributed.get_backend() == "nccl" else "cpu", (ranks(),))
    target.requires_grad_(False)
    for block in target.blocks:
        fully_shard(block.attn, mesh=mesh), fully_shard(block.ffn, mesh=mesh)
    fully_shard(target, mesh=mesh, ignored_params={p for p in target.parameters() if not hasattr(p, "device_mesh")})


def tensor_parallel(target):
    """One rank's share of a target on the meta device: 1/N of the heads and of the feed-forward width. The ranks add up
    what their shares of a layer put out, so that each goes on with the same sum."""
    widths = {name: getattr(target.config, name) for name in ("heads", "kv_heads", "ffn_dim")}
    if any(width % ranks() for width in widths.values()):
        raise UserError(f"{widths} cannot be divided among {ranks()} processes: choose another --nproc_per_node")
    with torch.device("meta"):
        share = Target(replace(target.config, **{name: width // ranks() for name, width in widths.items()}))
    for block in share.blocks:
        for layer in block.attn.out, block.ffn.down:
            layer.register_forward_hook(lambda layer, inputs, output: distributed.all_reduce(output))   # in place
    return share


def shard(name, parts, parameter):
    """What this rank keeps of the target's weight `name`, which is these parts stacked, to stand for `parameter`."""
    whole = torch.cat(parts)
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)   # no message
    if parameter.shape == whole.shape:
        return whole
    if name.endswith(("out.weight", "down.weight")):                                  # its inputs are split
        return whole.chunk(ranks(), dim=1)[rank()].contiguous()
    return torch.cat([part.chunk(ranks())[rank()] for part in parts])
