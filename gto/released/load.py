"""Published weights -> our modules: targets in Meta's, Hugging Face's or GGUF's layout, draft heads in EAGLE-3's.

Files are mapped, not read, and modules built on the meta device, without storage. Then one tensor after the other is
put together, converted and moved to where it will live: on one GPU, or a part of it on each rank of a torchrun."""
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed
from tqdm import tqdm

from gto.head import DraftHead
from gto.model import Target, rotary_frequencies
from gto.released.files import (EAGLE, GGUF, HUGGING_FACE, META, eagle_config, gguf_config, hugging_face_config, locate,
                                map_files, meta_config, pieces, read_gguf, read_json)
from gto.util import UserError, rank, ranks, reading

# The copy of a tied output matrix, rotary tables, a head's vocabulary map.
REDUNDANT = ("lm_head.weight", "rotary_emb.inv_freq", "rope.freqs", "rope_freqs.weight", "d2t", "t2d")


def load_target(path, device="cpu", dtype=torch.float32, ranks=None):
    """A frozen target as downloaded: a folder of Hugging Face or Meta, *.gguf or smollm2. ranks: "gather", "split"."""
    path = Path(path)
    if file := locate(path):
        layout, config_of, (numbers, tensors) = GGUF, gguf_config, read_gguf(file)
    elif (file := path / "config.json").exists():
        layout, config_of, numbers, tensors = HUGGING_FACE, hugging_face_config, read_json(file), map_files(path)
    elif (file := path / "params.json").exists():
        layout, config_of, numbers, tensors = META, meta_config, read_json(file), map_files(path)
    else:
        raise UserError(f"no target at {path}: give a *.pt, a *.gguf, or a folder with a config.json or params.json")
    with reading(file):
        config = config_of(numbers, tensors)
    with torch.device("meta"):
        target = whole = Target(config)
    if ranks == "gather":
        gather(target)
    elif ranks == "split":
        target = tensor_parallel(whole)
    fill(target, whole, layout, tensors, path, device, dtype)
    if config.tied:
        target.unembed.weight = target.embed.weight
    return target.eval().requires_grad_(False)


def load_head(path, target, dtype=None):
    """A draft head for this target, on its device and (dtype None) of its type, from an EAGLE-3 folder."""
    path, like = Path(path), target.norm.weight
    numbers, tensors = read_json(path / "config.json"), map_files(path)
    with reading(f"the EAGLE-3 head {path}"):
        config = eagle_config(numbers, tensors)
        ids = torch.arange(config.draft_vocab_size)                # [V'], d2t is target id minus draft id
        if config.draft_vocab_size < config.vocab_size:
            ids += tensors["d2t"][0]
        with torch.device("meta"):
            head = DraftHead(config.check_fits(target), target)
    fill(head, head, EAGLE, tensors, path, like.device, dtype or like.dtype)
    head.token_ids = ids.to(like.device)
    return head.eval()


def fill(model, whole, layout, tensors, path, device, dtype):
    """Give a module on the meta device its weights. `whole` is the module that the files hold: the same, or the one of
    which it is this rank's part. Tied parameters are listed once, and filled once."""
    wanted = {name: pieces(whole.config, layout, name, weight.shape) for name, weight in whole.named_parameters()}
    published = {source for parts in wanted.values() for source, _ in parts}
    if strange := sorted(name for name in published ^ tensors.keys() if not name.endswith(REDUNDANT)):
        raise UserError(f"{path}: {len(strange)} weights are missing or not expected: {', '.join(strange[:3])}")
    filled = {}
    for name, parts in tqdm(wanted.items(), f"load {path.name}", leave=False, disable=rank() > 0 or None):
        with reading(path):
            found = [join(source, tensors[source], shape, whole.config).to(dtype) for source, shape in parts]
            if not all(part.isfinite().all() for part in found):
                raise UserError(f"{name} holds numbers that are infinite or none")
        filled[name] = shard(name, found, model.get_parameter(name)).to(device)
    model.load_state_dict(filled, strict=False, assign=True)
    # Not a parameter, and float32 whatever the weights are. Llama 3.1's scaling is a tensor of divisors in a GGUF file.
    frequencies = rotary_frequencies(model.config)
    with reading(path):
        for divisors in tensors.get("rope_freqs.weight", ()):
            frequencies /= torch.from_numpy(divisors.data)
    model.frequencies = frequencies.to(device)


def join(name, shards, shape, config):
    """A published tensor of this shape in one piece. Its rows are in our order: Meta, and llama.cpp in a Llama, rotate
    neighbours (2j, 2j+1), we rotate halves (j, j + D/2), so the rows within a query or key head move."""
    # Meta cut some by rows, some by columns.
    tensor = shards[0] if len(shards) == 1 else torch.cat(shards, dim=int(len(shards[0]) == shape[0]))
    if not isinstance(tensor, torch.Tensor):
        from gguf.quants import dequantize                        # NotImplementedError for some quantisations
        tensor = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}, not {list(shape)}")
    if name.endswith(("q.weight", "k.weight")) and not config.qk_norm:
        tensor = tensor.view(-1, config.head_dim // 2, 2, shape[1]).transpose(1, 2).reshape(shape)
    return tensor


def gather(target):
    """For training, where ranks read different texts (FSDP2): leave on each 1/N of the layers of a target on the meta
    device; a layer's weights are gathered when it runs, then dropped. The head uses what is outside them too. All
    ranks must run the target equally often."""
    from torch.distributed.fsdp import fully_shard                                    # slow to import, rarely needed
    mesh = distributed.init_device_mesh("cuda" if distributed.get_backend() == "nccl" else "cpu", (ranks(),))
    target.requires_grad_(False)
    for block in target.blocks:
        fully_shard(block.attn, mesh=mesh), fully_shard(block.ffn, mesh=mesh)
    fully_shard(target, mesh=mesh, ignored_params={p for p in target.parameters() if not hasattr(p, "device_mesh")})


def tensor_parallel(target):
    """For decoding: one rank's share of a target on the meta device, 1/N of the heads and of the feed-forward width.
    The ranks add up what their shares of a layer put out, so that each goes on with the same sum."""
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
