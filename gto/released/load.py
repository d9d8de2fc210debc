"""Published weights -> our modules: targets in Meta's or Hugging Face's layout, draft heads in EAGLE-3's.

Files are mapped into memory, not read, and modules are built without storage, on the meta device. Then one tensor after
the other is put together, converted and moved to where it will live: main memory holds only that one besides the model.
"""
from pathlib import Path

import torch
from tqdm import tqdm

from gto.head import DraftHead
from gto.model import Target, rotary_frequencies
from gto.released import parallel
from gto.released.layouts import (EAGLE, HUGGING_FACE, META, eagle_config, hugging_face_config, meta_config, pieces,
                                  read_json)
from gto.util import UserError, rank


def load_target(path, device="cpu", dtype=None, ranks=None):
    """A frozen target from a folder as downloaded: config.json with *.safetensors or *.bin (Llama, Qwen3), or
    params.json with consolidated.*.pth (Meta's Llamas). UserError for a file that is missing, cut short, of another
    architecture, or whose tensors do not fit its config.

    dtype None: bfloat16 on a GPU, float32 on a CPU, where bfloat16 crawls. ranks: see gto/released/parallel.py."""
    path = Path(path)
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    if (path / "config.json").exists():
        layout, config = HUGGING_FACE, hugging_face_config(path / "config.json")
        tensors = map_files(hugging_face_files(path))
    elif (path / "params.json").exists():
        layout, tensors = META, map_files(sorted(path.glob("consolidated.*.pth")))
        config = meta_config(path / "params.json", tensors)
    else:
        raise UserError(f"no target at {path}: give a checkpoint *.pt, or a folder with config.json (Hugging Face) or "
                        f"params.json (Meta) beside the weights")
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
    """A draft head for this target, on its device and (dtype None) of its type, from an EAGLE-3 folder: config.json
    with pytorch_model.bin or model.safetensors."""
    path, like = Path(path), target.norm.weight
    if not (path / "config.json").exists():
        raise UserError(f"no draft head at {path}: give a checkpoint *.pt, or a folder with config.json beside weights")
    tensors = map_files(hugging_face_files(path))
    config = eagle_config(path, tensors).check_fits(path, target)
    with torch.device("meta"):
        head = DraftHead(config, target)
    fill(head, head, EAGLE, tensors, path, like.device, dtype or like.dtype)
    ids = torch.arange(config.draft_vocab_size)                    # [V'], d2t is target id minus draft id
    head.token_ids = (ids + tensors["d2t"][0] if config.draft_vocab_size < config.vocab_size else ids).to(like.device)
    return head.eval()


def hugging_face_files(path):
    """The weight files of a folder: one, or those its index names."""
    for name in ("pytorch_model.bin", "model.safetensors"):
        if (path / name).exists():
            return [path / name]
        if (path / f"{name}.index.json").exists():
            names = set(read_json(path / f"{name}.index.json", "weight_map")["weight_map"].values())
            return [path / name for name in sorted(names)]
    return []


def map_files(files):
    """{published name: [tensor, one from each of Meta's shards that has a part of it]}, mapped: nothing is read yet."""
    tensors = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                from safetensors.torch import load_file
                contents = load_file(file)
            else:
                contents = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except ImportError:
            raise UserError(f"{file} needs a package to be read: pip install safetensors") from None
        except Exception as error:                                # pickle, zipfile and the others have their own
            raise UserError(f"{file} is missing, no file of weights, or cut short ({type(error).__name__}): download it"
                            f" again") from None
        for name, tensor in contents.items():
            if name not in tensors or tensor.dim() > 1:           # norms are whole in every shard
                tensors.setdefault(name, []).append(tensor)
    return tensors


def fill(model, whole, layout, tensors, path, device, dtype):
    """Give a module on the meta device its weights. `whole` is the module that the files hold: the same, or the one of
    which it is this rank's part. Tied parameters are listed once, and filled once."""
    wanted = {name: pieces(whole.config, layout, name, weight.shape) for name, weight in whole.named_parameters()}
    check(dict(piece for parts in wanted.values() for piece in parts), tensors, path)
    filled = {}
    for name, parts in tqdm(wanted.items(), f"load {path.name}", leave=False, disable=rank() > 0 or None):
        weight = torch.cat([join(source, tensors[source], shape, whole.config) for source, shape in parts]).to(dtype)
        filled[name] = parallel.shard(name, weight, model.get_parameter(name), whole.config).to(device)
    model.load_state_dict(filled, strict=False, assign=True)
    # Not a parameter, and float32 whatever the weights are.
    model.frequencies = rotary_frequencies(model.config).to(device)


def check(shapes, tensors, path):
    """UserError that names the tensors which are missing, left over, or of the wrong shape."""
    # The copy of a tied output matrix, old Llamas' rotary tables, a head's vocabulary map (see load_head).
    redundant = ("lm_head.weight", "rotary_emb.inv_freq", "rope.freqs", "d2t", "t2d")
    problems = {
        "missing": [name for name in shapes if name not in tensors],
        "not expected": [name for name in tensors if name not in shapes and not name.endswith(redundant)],
        "of the wrong shape": [f"{name} {list(tensors[name][0].shape)}, not {list(shape)}" for name, shape in
                               shapes.items() if name in tensors and cut_axis(tensors[name], shape) is None]}
    said = [f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for what, names in problems.items() if names]
    if said:
        raise UserError(f"{path}: the weights do not fit the config: {'; '.join(said)}")


def cut_axis(shards, shape):
    """The axis along which shards make up a tensor of this shape (Meta cut some by rows, some by columns), or None."""
    each = tuple(shards[0].shape)
    return next((axis for axis in range(len(shape))
                 if each[:axis] + (each[axis] * len(shards),) + each[axis + 1:] == shape), None)


def join(name, shards, shape, config):
    """A published tensor in one piece, its rows in our order: Meta rotates neighbours (2j, 2j+1), we rotate halves
    (j, j + D/2), so the rows within a query or key head move."""
    tensor = shards[0] if len(shards) == 1 else torch.cat(shards, cut_axis(shards, shape))
    if name.endswith(("wq.weight", "wk.weight")):
        tensor = tensor.view(-1, config.head_dim // 2, 2, shape[1]).transpose(1, 2).reshape(shape)
    return tensor
