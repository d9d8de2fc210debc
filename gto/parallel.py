"""Several processes, one training: torchrun --nproc_per_node=N train.py ...

Data parallel: every process (rank) holds the head, computes the gradient of its own rows of the batch, and all take the
same step with the average. A frozen target that is too large for one GPU is spread over the ranks by FSDP2. What is
written, rank 0 writes.
"""
import atexit
import os

import torch
from torch import distributed

from gto.errors import UserError


def rank():
    return distributed.get_rank() if distributed.is_initialized() else 0


def ranks():
    """How many processes there are; 1 without torchrun."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def start(device):
    """Join the other processes that torchrun started, each on a GPU of its own. Without torchrun nothing happens."""
    if distributed.is_torchelastic_launched():
        if device == "cuda":
            if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
                raise UserError(f"--nproc_per_node is larger than the {torch.cuda.device_count()} GPUs of this machine")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))                      # from here on "cuda" is this one
        distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        atexit.register(distributed.destroy_process_group)


def average(tensors):
    """Replace each tensor by its mean over all ranks, in place."""
    if ranks() > 1:
        try:
            for tensor in tensors:
                distributed.all_reduce(tensor)
                tensor /= ranks()
        except RuntimeError as error:
            raise lost(error) from None


def exists(path):
    """Whether a file is there, to all ranks as rank 0 finds it: one that looks later may see what was made since."""
    found = [os.path.exists(path)]
    if ranks() > 1:
        try:
            distributed.broadcast_object_list(found)
        except RuntimeError as error:
            raise lost(error) from None
    return found[0]


def wait():
    """Until all ranks are here."""
    if ranks() > 1:
        try:
            distributed.barrier()
        except RuntimeError as error:
            raise lost(error) from None


def lost(error):
    return UserError(f"rank {rank()} has lost another process of this training ({str(error).splitlines()[0][:100]}): look "
                     f"for that one's message, then start the same command again, it goes on from the last checkpoint")


def spread(target):
    """Leave on each rank 1/N of the target's layers (FSDP2); one's weights are gathered when it runs, then dropped.

    target: on the meta device; gto.load then gives each rank its part, so that the whole is never on one GPU.
    Embedding, output and norms stay whole, the head uses them too. All ranks must run the target equally often.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard                                    # slow to import, rarely needed
    mesh = init_device_mesh("cuda" if distributed.get_backend() == "nccl" else "cpu", (ranks(),))
    target.requires_grad_(False)
    for block in target.blocks:
        fully_shard(block.attn, mesh=mesh), fully_shard(block.ffn, mesh=mesh)
    fully_shard(target, mesh=mesh, ignored_params={p for p in target.parameters() if not is_spread(p)})


def is_spread(parameter):
    return hasattr(parameter, "device_mesh")


def own_part(whole, parameter):
    """What this rank keeps of a weight that stands for `parameter` of a module that may be spread."""
    if not is_spread(parameter):
        return whole
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)  # no message sent
