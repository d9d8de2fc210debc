"""Published weights -> our modules: targets in Meta's, Hugging Face's or GGUF's layout, draft heads in EAGLE-3's.

Files are mapped into memory, not read, and modules are built without storage, on the meta device. Then one tensor after
the other is put together, converted and moved to where it will live: main memory holds that one besides the model."""
from pathlib import Path

import torch
from tqdm import tqdm

from gto.head import DraftHead
from gto.model import Target, rotary_frequencies
from gto.released import parallel
from gto.released.files import dequantise, locate, map_files, read_gguf, read_json
from gto.released.layouts import (EAGLE, GGUF, HUGGING_FACE, META, eagle_config, gguf_config, hugging_face_config,
                                  meta_config, pieces)
from gto.util import UserError, rank, reading

# The copy of a tied output matrix, rotary tables, a head's vocabulary map.
REDUNDANT = ("lm_head.weight", "rotary_emb.inv_freq", "rope.freqs", "rope_freqs.weight", "d2t", "t2d")


def load_target(path, device="cpu", dtype=torch.float32, ranks=None):
    """A frozen target as downloaded: a folder of Hugging Face or Meta, a *.gguf, or smollm2. ranks: see parallel.py."""
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
        parallel.gather(target)
    elif ranks == "split":
        target = parallel.tensor_parallel(whole)
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
        filled[name] = parallel.shard(name, found, model.get_parameter(name)).to(device)
    model.load_state_dict(filled, strict=False, assign=True)
    # Not a parameter, and float32 whatever the weights are. Llama 3.1's scaling is a tensor of divisors in a GGUF file.
    frequencies = rotary_frequencies(model.config)
    with reading(path):
        for divisors in tensors.get("rope_freqs.weight", ()):
            frequencies /= dequantise(divisors)
    model.frequencies = frequencies.to(device)


def join(name, shards, shape, config):
    """A published tensor of this shape in one piece. Its rows are in our order: Meta, and llama.cpp in a Llama, rotate
    neighbours (2j, 2j+1), we rotate halves (j, j + D/2), so the rows within a query or key head move."""
    # Meta cut some by rows, some by columns.
    tensor = shards[0] if len(shards) == 1 else torch.cat(shards, dim=int(len(shards[0]) == shape[0]))
    if not isinstance(tensor, torch.Tensor):
        tensor = dequantise(tensor)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}, not {list(shape)}")
    if name.endswith(("q.weight", "k.weight")) and not config.qk_norm:
        tensor = tensor.view(-1, config.head_dim // 2, 2, shape[1]).transpose(1, 2).reshape(shape)
    return tensor
