"""Published weights -> our modules: targets in Meta's or Hugging Face's layout, draft heads in EAGLE-3's.

A file is mapped into memory, not read: each of our tensors is allocated where it will live, in its final type, and
filled piece by piece from the mapped file. The modules are built without storage, on the meta device. So the
largest thing ever in main memory besides the model is one piece that the operating system has paged in.
"""
import json
from math import prod
from pathlib import Path

import torch
from tqdm import tqdm

from gto import checkpoint
from gto.errors import UserError
from gto.head import DraftHead, HeadConfig
from gto.model import ModelConfig, Target, cast, rotary_frequencies

# Our names and the published ones. Several published tensors are stacked, in this order, into one of ours.
HUGGING_FACE = {
    "embed.weight": ["model.embed_tokens.weight"],
    "blocks.{}.attn_norm.weight": ["model.layers.{}.input_layernorm.weight"],
    "blocks.{}.attn.qkv.weight": [f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkv"],
    "blocks.{}.attn.q_norm.weight": ["model.layers.{}.self_attn.q_norm.weight"],
    "blocks.{}.attn.k_norm.weight": ["model.layers.{}.self_attn.k_norm.weight"],
    "blocks.{}.attn.out.weight": ["model.layers.{}.self_attn.o_proj.weight"],
    "blocks.{}.ffn_norm.weight": ["model.layers.{}.post_attention_layernorm.weight"],
    "blocks.{}.ffn.gate_up.weight": ["model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"],
    "blocks.{}.ffn.down.weight": ["model.layers.{}.mlp.down_proj.weight"],
    "norm.weight": ["model.norm.weight"],
    "unembed.weight": ["lm_head.weight"],
}
META = {
    "embed.weight": ["tok_embeddings.weight"],
    "blocks.{}.attn_norm.weight": ["layers.{}.attention_norm.weight"],
    "blocks.{}.attn.qkv.weight": [f"layers.{{}}.attention.w{x}.weight" for x in "qkv"],
    "blocks.{}.attn.out.weight": ["layers.{}.attention.wo.weight"],
    "blocks.{}.ffn_norm.weight": ["layers.{}.ffn_norm.weight"],
    "blocks.{}.ffn.gate_up.weight": ["layers.{}.feed_forward.w1.weight", "layers.{}.feed_forward.w3.weight"],
    "blocks.{}.ffn.down.weight": ["layers.{}.feed_forward.w2.weight"],
    "norm.weight": ["norm.weight"],
    "unembed.weight": ["output.weight"],
}
EAGLE = {
    "embed.weight": ["embed_tokens.weight"],
    "fc.weight": ["fc.weight"],
    "token_norm.weight": ["midlayer.input_layernorm.weight"],
    "feature_norm.weight": ["midlayer.hidden_norm.weight"],
    "attn.qkv.weight": [f"midlayer.self_attn.{x}_proj.weight" for x in "qkv"],
    "attn.out.weight": ["midlayer.self_attn.o_proj.weight"],
    "ffn_norm.weight": ["midlayer.post_attention_layernorm.weight"],
    "ffn.gate_up.weight": ["midlayer.mlp.gate_proj.weight", "midlayer.mlp.up_proj.weight"],
    "ffn.down.weight": ["midlayer.mlp.down_proj.weight"],
    "norm.weight": ["norm.weight"],
    "unembed.weight": ["lm_head.weight"],
}


def load_target(path, device="cpu", dtype=None):
    """A frozen target.

    path     a folder as downloaded: config.json with *.safetensors or *.bin (Llama, Qwen3), or params.json with
             consolidated.*.pth (Meta's Llamas); or a checkpoint *.pt of train.py
    dtype    None: a *.pt as it was saved, downloads in bfloat16 on a GPU and float32 on a CPU, where bfloat16 crawls
    UserError for a file that is missing, cut short, of another architecture, or whose tensors do not fit its config.
    """
    path = Path(path)
    if path.suffix == ".pt":
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
        target = Target(config)
    fill(target, layout, tensors, path, device, dtype)
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
        raise UserError(f"no draft head at {path}: give a checkpoint *.pt or a folder with config.json beside the weights")
    tensors = read_shards(hugging_face_shards(path))
    config = eagle_config(path, tensors)
    if (config.target_dim, config.vocab_size) != (target.config.dim, target.config.vocab_size):
        raise UserError(f"{path} was made for another target: {config.target_dim} wide with {config.vocab_size} tokens, "
                        f"this one has {target.config.dim} and {target.config.vocab_size}")
    if config.dim != target.config.dim and not config.own_embedding:
        raise UserError(f"{path} is {config.dim} wide, its target {target.config.dim}: then it needs embed_tokens.weight")
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
    raise UserError(f"{path} has a config.json but no weights: pytorch_model.bin or model.safetensors, whole or in shards")


def meta_shards(path):
    shards = sorted(path.glob("consolidated.*.pth"))
    if not shards:
        raise UserError(f"{path} has a params.json but no weights: consolidated.00.pth and so on")
    return shards


def read_json(path, *keys):
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        for key in keys:
            contents[key]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged or not what its name says ({type(error).__name__}: {error})") from None
    return contents


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
    except Exception as problem:                                  # pickle, zipfile, torch and safetensors have their own
        error = type(problem).__name__
    raise UserError(f"{file} is not a file of weights, or is cut short ({error}): download it again") from None


# Configurations -------------------------------------------------------------------------------------------------

def hugging_face_config(file):
    c = read_json(file, "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                  "vocab_size")
    if c["model_type"] not in ("llama", "qwen3"):
        raise UserError(f"{file}: targets of type '{c['model_type']}' are not supported, only llama and qwen3")
    # transformers 5 has one dictionary, transformers 4 a number and, where it applies, a dictionary.
    rope = c.get("rope_parameters") or {"rope_theta": c.get("rope_theta", 10000.0), **(c.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{file}: rotary scaling of type '{kind}' is not supported, only llama3")
    scaling = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return ModelConfig(
        vocab_size=c["vocab_size"], layers=c["num_hidden_layers"], dim=c["hidden_size"],
        heads=c["num_attention_heads"], kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
        head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"], ffn_dim=c["intermediate_size"],
        max_len=c.get("max_position_embeddings", 2048), norm_eps=c.get("rms_norm_eps", 1e-6),
        rope_theta=rope["rope_theta"], rope_scaling=tuple(rope[x] for x in scaling) if kind == "llama3" else None,
        tied=c.get("tie_word_embeddings", False), qk_norm=c["model_type"] == "qwen3")


def meta_config(file, tensors):
    """params.json leaves out what Meta's code knows: the width of the feed-forward layer is to be worked out, the
    constants of the rotary scaling and the context length are not in it at all."""
    p = read_json(file, "dim", "n_layers", "n_heads", "norm_eps")
    width = int(p.get("ffn_dim_multiplier", 1) * int(2 * 4 * p["dim"] / 3))
    multiple = p.get("multiple_of", 256)
    scaled = p.get("use_scaled_rope", False)
    output = tensors.get("output.weight", [])                     # cut by rows; vocab_size may be -1 (Llama 1 and 2)
    return ModelConfig(
        vocab_size=sum(len(shard) for shard in output), layers=p["n_layers"], dim=p["dim"], heads=p["n_heads"],
        kv_heads=p.get("n_kv_heads") or p["n_heads"], head_dim=p["dim"] // p["n_heads"],
        ffn_dim=-(-width // multiple) * multiple, max_len=131072 if scaled else 8192 if "rope_theta" in p else 2048,
        norm_eps=p["norm_eps"], rope_theta=p.get("rope_theta", 10000.0),
        rope_scaling=(8.0, 1.0, 4.0, 8192) if scaled else None, tied=False)


def eagle_config(path, tensors):
    """Sizes that the files get wrong or leave out (head_dim, target_hidden_size) are read off the tensors.

    The rotary base is 10000 unless rope_theta is there, and never scaled: that is how EAGLE trains, whatever the
    target does. num_hidden_layers is ignored, some files say the target's; there is one.
    """
    c = read_json(path / "config.json", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    if not {"fc.weight", "midlayer.self_attn.q_proj.weight"} <= tensors.keys():
        raise UserError(f"{path} is no EAGLE-3 head: it has no fc.weight or no midlayer.self_attn.q_proj.weight")
    heads = c["num_attention_heads"]
    return HeadConfig(
        vocab_size=c["vocab_size"], draft_vocab_size=c.get("draft_vocab_size") or c["vocab_size"], dim=c["hidden_size"],
        heads=heads, kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=len(tensors["midlayer.self_attn.q_proj.weight"][0]) // heads, ffn_dim=c["intermediate_size"],
        max_len=c.get("max_position_embeddings", 2048), norm_eps=c.get("rms_norm_eps", 1e-6),
        rope_theta=c.get("rope_theta", 10000.0), target_dim=tensors["fc.weight"][0].shape[-1] // 3, tied=False,
        own_embedding="embed_tokens.weight" in tensors)


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


# Filling --------------------------------------------------------------------------------------------------------

def fill(model, layout, tensors, path, device, dtype):
    """Give a module on the meta device its tensors. Tied parameters are listed once, and filled once."""
    wanted = {name: (parameter.shape, pieces(model.config, layout, name, parameter.shape))
              for name, parameter in model.named_parameters()}
    check(wanted, tensors, path)
    size = sum(prod(shape) for shape, _ in wanted.values()) * dtype.itemsize
    filled = {}
    with tqdm(total=size, desc=f"load {path.name}", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for name, (shape, parts) in wanted.items():
            filled[name] = torch.empty(shape, dtype=dtype, device=device)
            for rows, (source, part_shape) in zip(filled[name].split([shape[0] for _, shape in parts]), parts):
                copy(rows, tensors[source], part_shape, model.config, rotary=source.endswith(("wq.weight", "wk.weight")))
            bar.update(filled[name].nbytes)
    model.load_state_dict(filled, strict=False, assign=True)
    # Not a parameter, and float32 whatever the weights are.
    model.frequencies = rotary_frequencies(model.config).to(device)
    return model


def pieces(config, layout, name, shape):
    """[(published name, its shape), ...] of one of our parameters."""
    number = next((part for part in name.split(".") if part.isdigit()), "")
    sources = [source.format(number) for source in layout[name.replace(number, "{}", 1) if number else name]]
    if name.endswith("qkv.weight"):
        rows = [config.heads * config.head_dim] + 2 * [config.kv_heads * config.head_dim]
    else:
        rows = [shape[0] // len(sources)] * len(sources)
    return [(source, (n, *shape[1:])) for source, n in zip(sources, rows)]


def check(wanted, tensors, path):
    """UserError that names the tensors which are missing, left over, or of the wrong shape."""
    shapes = {source: shape for _, parts in wanted.values() for source, shape in parts}
    # The copy of a tied output matrix, old Llamas' rotary tables, a head's vocabulary map (see draft_token_ids).
    redundant = ("lm_head.weight", "rotary_emb.inv_freq", "rope.freqs", "d2t", "t2d")
    problems = {
        "missing": [name for name in shapes if name not in tensors],
        "not expected": [name for name in tensors if name not in shapes and not name.endswith(redundant)],
        "of the wrong shape": [f"{name} {' + '.join(str(list(t.shape)) for t in tensors[name])}, not {list(shape)}"
                               for name, shape in shapes.items() if name in tensors and join_axis(tensors[name], shape) is None]}
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
