"""Published weights -> our modules: targets in Meta's or Hugging Face's layout, draft heads in EAGLE-3's.

A file is mapped into memory, not read: each of our tensors is allocated where it will live, in its final type, and
filled piece by piece from the mapped file. The modules are built without storage, on the meta device. So the
largest thing ever in main memory besides the model is one piece that the operating system has paged in.
"""
from math import prod
from pathlib import Path

import torch
from tqdm import tqdm

from gto import checkpoint, parallel
from gto.errors import UserError
from gto.head import DraftHead
from gto.layouts import EAGLE, HUGGING_FACE, META, eagle_config, hugging_face_config, meta_config, pieces, read_json
from gto.model import Target, cast, rotary_frequencies


def load_target(path, device="cpu", dtype=None, ranks=None):
    """A frozen target.

    path     a folder as downloaded: config.json with *.safetensors or *.bin (Llama, Qwen3), or params.json with
             consolidated.*.pth (Meta's Llamas); or a checkpoint *.pt of train.py
    dtype    None: a *.pt as it was saved, downloads in bfloat16 on a GPU and float32 on a CPU, where bfloat16 crawls
    ranks    under torchrun, "gather" or "split" gives each rank a part of a download: see gto.parallel
    UserError for a file that is missing, cut short, of another architecture, or whose tensors do not fit its config.
    """
    path = Path(path)
    if path.suffix == ".pt":
        if ranks:
            raise UserError(f"{path} fits one GPU: only a download is divided among several")
        target = checkpoint.load_target(path, device)
        return target if dtype is None else cast(target, dtype)
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    if (path / "config.json").exists():
        config, layout = hugging_face_config(path / "config.json"), HUGGING_FACE
        tensors = read_shards(hugging_face_shards(path))
    elif (path / "params.json").exists():
        layout, tensors = META, read_shards(meta_shards(path))
        config = meta_config(path / "params.json", tensors)
    else:
        raise UserError(f"no target at {path}: give a checkpoint *.pt, or a folder with config.json (Hugging Face) or "
                        f"params.json (Meta) beside the weights")
    with torch.device("meta"):
        whole = Target(config)
        target = Target(parallel.split(config)) if ranks == "split" else whole
    if ranks == "gather":
        parallel.gather(target)
    fill(target, layout, tensors, path, device, dtype, whole)
    if ranks == "split":
        parallel.add_up(target)
    if config.tied:
        target.unembed.weight = target.embed.weight
    return target.eval().requires_grad_(False)


def load_head(path, target, dtype=None):
    """A draft head for this target, on its device: an EAGLE-3 folder (config.json with pytorch_model.bin or
    model.safetensors), or a checkpoint *.pt of train.py. dtype None: a *.pt as it was saved, else the target's type.
    """
    path, like = Path(path), target.norm.weight
    if path.suffix == ".pt":
        head = checkpoint.load_head(path, target, like.device)
        return head if dtype is None else cast(head, dtype)
    if not (path / "config.json").exists():
        raise UserError(f"no draft head at {path}: give a checkpoint *.pt, or a folder with config.json beside weights")
    tensors = read_shards(hugging_face_shards(path))
    config = eagle_config(path, tensors)
    if (config.target_dim, config.vocab_size) != (target.config.dim, target.config.vocab_size):
        raise UserError(f"{path} was made for another target: {config.target_dim} wide with {config.vocab_size} tokens,"
                        f" this one has {target.config.dim} and {target.config.vocab_size}")
    if config.dim != target.config.dim and not config.own_embedding:
        raise UserError(f"{path} is {config.dim} wide, its target {target.config.dim}: so it needs embed_tokens.weight")
    with torch.device("meta"):
        head = DraftHead(config, target)
    head.token_ids = draft_token_ids(path, tensors, config).to(like.device)
    return fill(head, EAGLE, tensors, path, like.device, dtype or like.dtype).eval()


# Files ----------------------------------------------------------------------------------------------------------

def hugging_face_shards(path):
    """The weight files of a folder: one, or those its index names."""
    for name in ("pytorch_model.bin", "model.safetensors"):
        if (path / name).exists():
            return [path / name]
        if (path / f"{name}.index.json").exists():
            names = sorted(set(read_json(path / f"{name}.index.json", "weight_map")["weight_map"].values()))
            return [path / name for name in names]
    raise UserError(f"{path} has a config.json but no weights: pytorch_model.bin or model.safetensors, or an index of "
                    f"their shards")


def meta_shards(path):
    shards = sorted(path.glob("consolidated.*.pth"))
    if not shards:
        raise UserError(f"{path} has a params.json but no weights: consolidated.00.pth and so on")
    return shards


def read_shards(files):
    """{published name: [tensor, one per file that has the name]}, mapped into memory: nothing is read yet."""
    tensors = {}
    for file in files:
        if not file.exists():
            raise UserError(f"{file} is missing: the download is not complete")
        for name, tensor in map_file(file).items():
            tensors.setdefault(name, []).append(tensor)
    return tensors


def map_file(file):
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(file)
        contents = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        if all(isinstance(tensor, torch.Tensor) for tensor in contents.values()):
            return contents
        error = "it holds more than tensors"
    except ImportError:
        raise UserError(f"{file} needs a package to be read: pip install safetensors") from None
    except Exception as problem:                                  # pickle, zipfile and the others have their own
        error = type(problem).__name__
    raise UserError(f"{file} is not a file of weights, or is cut short ({error}): download it again") from None


# Tensors --------------------------------------------------------------------------------------------------------

def draft_token_ids(path, tensors, config):
    """Draft id -> target id [V']. The files store the difference, d2t; without it the two vocabularies are the same."""
    ids = torch.arange(config.draft_vocab_size)
    if config.draft_vocab_size == config.vocab_size:
        return ids
    if "d2t" not in tensors or tensors["d2t"][0].shape != ids.shape:
        raise UserError(f"{path}: needs a d2t of {len(ids)} entries, as many as its draft_vocab_size")
    ids = ids + tensors["d2t"][0]
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise UserError(f"{path}: d2t points outside of the target's {config.vocab_size} tokens")
    return ids


def fill(model, layout, tensors, path, device, dtype, whole=None):
    """Give a module on the meta device its tensors. Tied parameters are listed once, and filled once.

    whole: what the files hold, if the model is this rank's part of it.
    """
    config = (whole or model).config
    wanted = {name: (parameter.shape, pieces(config, layout, name, parameter.shape))
              for name, parameter in (whole or model).named_parameters()}
    check(wanted, tensors, path)
    size = sum(prod(shape) for shape, _ in wanted.values()) * dtype.itemsize
    filled = {}
    with tqdm(total=size, desc=f"load {path.name}", unit="B", unit_scale=True, disable=parallel.rank() > 0 or None,
              leave=False) as bar:
        for name, (shape, parts) in wanted.items():
            weight = torch.empty(shape, dtype=dtype, device=device if parallel.ranks() == 1 else "cpu")
            for rows, (source, part) in zip(weight.split([shape[0] for _, shape in parts]), parts):
                copy(rows, tensors[source], part, config, rotary=source.endswith(("wq.weight", "wk.weight")))
            bar.update(weight.nbytes)
            filled[name] = parallel.own_part(name, weight, model.get_parameter(name), config).to(device)
    model.load_state_dict(filled, strict=False, assign=True)
    # Not a parameter, and float32 whatever the weights are.
    model.frequencies = rotary_frequencies(model.config).to(device)
    return model


def check(wanted, tensors, path):
    """UserError that names the tensors which are missing, left over, or of the wrong shape."""
    shapes = {source: shape for _, parts in wanted.values() for source, shape in parts}
    # The copy of a tied output matrix, old Llamas' rotary tables, a head's vocabulary map (see draft_token_ids).
    redundant = ("lm_head.weight", "rotary_emb.inv_freq", "rope.freqs", "d2t", "t2d")
    problems = {
        "missing": [name for name in shapes if name not in tensors],
        "not expected": [name for name in tensors if name not in shapes and not name.endswith(redundant)],
        "of the wrong shape": [f"{name} {' + '.join(str(list(t.shape)) for t in tensors[name])}, not {list(shape)}"
                               for name, shape in shapes.items()
                               if name in tensors and join_axis(tensors[name], shape) is None]}
    if any(problems.values()):
        said = [f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
                for what, names in problems.items() if names]
        raise UserError(f"{path}: the weights do not fit the config: {'; '.join(said)}")


def join_axis(shards, shape):
    """Along which axis the shards make up a tensor of this shape; the shape tells how Meta cut it. None: they do not.

    Norms are repeated in every shard: axis 0, but only the first is used.
    """
    shape, each = tuple(shape), tuple(shards[0].shape)
    if any(tuple(shard.shape) != each for shard in shards):
        return None
    if each == shape:
        return 0
    return next((axis for axis in range(len(shape))
                 if each[:axis] + (each[axis] * len(shards),) + each[axis + 1:] == shape), None)


def copy(rows, shards, shape, config, rotary):
    """Write the published tensor, given in shards, into `rows`, a slice of one of our parameters.

    rotary: Meta rotates neighbours (2j, 2j+1), we rotate halves (j, j + D/2), so the rows within a head move.
    """
    if tuple(shards[0].shape) == tuple(shape):
        shards = shards[:1]
    axis = join_axis(shards, shape)
    for part, shard in zip(rows.chunk(len(shards), dim=axis), shards):
        if rotary:
            shard = shard.view(-1, config.head_dim // 2, 2, shard.shape[-1]).transpose(1, 2).reshape(shard.shape)
        part.copy_(shard)
