"""Published weights -> our modules: targets in Hugging Face's or GGUF's layout, draft heads in EAGLE-3's.
Files are mapped, not read, modules built on the meta device; then each tensor is put together, converted, moved."""
from pathlib import Path

import torch
from tqdm import tqdm

from gto.head import DraftHead
from gto.model import Target, rotary_frequencies
from gto.released.files import (EAGLE, GGUF, HUGGING_FACE, eagle_config, gguf_config, hugging_face_config, locate,
                                map_files, pieces, read_gguf, read_json)
from gto.util import UserError, rank, reading

# The copy of a tied output matrix, rotary tables, a head's vocabulary map.
REDUNDANT = ("lm_head.weight", "rotary_emb.inv_freq", "rope_freqs.weight", "d2t", "t2d")


def load_target(path, device="cpu", dtype=torch.float32):
    """A frozen target as downloaded: a folder of Hugging Face's, a *.gguf or smollm2."""
    path = Path(path)
    if file := locate(path):
        layout, (numbers, tensors) = GGUF, read_gguf(file)
    elif (file := path / "config.json").exists():
        layout, numbers, tensors = HUGGING_FACE, read_json(file), map_files(path)
    else:
        raise UserError(f"no target at {path}: give a *.pt, a *.gguf, or a folder with a config.json")
    with reading(file), torch.device("meta"):
        target = Target(gguf_config(numbers, tensors) if layout is GGUF else hugging_face_config(numbers))
    fill(target, layout, tensors, path, device, dtype)
    if target.config.tied:
        target.unembed.weight = target.embed.weight
    return target.eval().requires_grad_(False)


def load_head(path, target, dtype=None):
    """A frozen draft head for this target, on its device and (dtype None) of its type, from an EAGLE-3 folder."""
    path, like = Path(path), target.norm.weight
    numbers, tensors = read_json(path / "config.json"), map_files(path)
    with reading(f"the EAGLE-3 head {path}"):
        config = eagle_config(numbers, tensors)
        ids = torch.arange(config.draft_vocab_size)                # [V'], d2t is target id minus draft id
        if config.draft_vocab_size < config.vocab_size:
            ids += tensors["d2t"]
        with torch.device("meta"):
            head = DraftHead(config.check_fits(target), target)
    fill(head, EAGLE, tensors, path, like.device, dtype or like.dtype)
    head.token_ids = ids.to(like.device)
    return head.eval().requires_grad_(False)


def fill(model, layout, tensors, path, device, dtype):
    """Give a module on the meta device its weights. Tied parameters are listed once, and filled once."""
    wanted = {name: pieces(model.config, layout, name, weight.shape) for name, weight in model.named_parameters()}
    published = {source for parts in wanted.values() for source, _ in parts}
    if strange := sorted(name for name in published ^ tensors.keys() if not name.endswith(REDUNDANT)):
        raise UserError(f"{path}: {len(strange)} weights are missing or not expected: {', '.join(strange[:3])}")
    filled = {}
    for name, parts in tqdm(wanted.items(), f"load {path.name}", leave=False, disable=rank() > 0 or None):
        with reading(path):
            filled[name] = torch.cat([convert(source, tensors[source], shape, model.config).to(dtype)
                                      for source, shape in parts]).to(device)
            if not filled[name].isfinite().all():
                raise UserError(f"{name} holds numbers that are infinite or none")
    model.load_state_dict(filled, strict=False, assign=True)
    # Not a parameter, and float32 whatever the weights are. Llama 3.1's scaling is a tensor of divisors in a GGUF file.
    frequencies = rotary_frequencies(model.config)
    with reading(path):
        if "rope_freqs.weight" in tensors:
            frequencies /= torch.from_numpy(tensors["rope_freqs.weight"].data)
    model.frequencies = frequencies.to(device)


def convert(name, tensor, shape, config):
    """A published tensor of this shape as ours. llama.cpp rotates neighbours (2j, 2j+1) in a Llama, we rotate halves
    (j, j + D/2): so the rows within its query or key heads move."""
    if not isinstance(tensor, torch.Tensor):
        from gguf.quants import dequantize                        # NotImplementedError for some quantisations
        tensor = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}, not {list(shape)}")
    if name.endswith(("attn_q.weight", "attn_k.weight")) and not config.qk_norm:
        tensor = tensor.view(-1, config.head_dim // 2, 2, shape[1]).transpose(1, 2).reshape(shape)
    return tensor
