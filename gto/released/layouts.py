"""What published files call things: tensor names and config keys, of targets (Meta, Hugging Face) and EAGLE-3 heads."""
import json
import re

from gto.head import HeadConfig
from gto.model import ModelConfig
from gto.util import UserError

# Our names and the published ones, all without ".weight". Several published tensors are stacked, in this order, into
# one of ours.
LAYER = {"attn.qkv": [f"self_attn.{x}_proj" for x in "qkv"], "attn.out": ["self_attn.o_proj"],
         "ffn_norm": ["post_attention_layernorm"], "ffn.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
         "ffn.down": ["mlp.down_proj"]}
HUGGING_FACE = {"embed": ["model.embed_tokens"], "norm": ["model.norm"], "unembed": ["lm_head"]} | {
    f"blocks.{{}}.{ours}": [f"model.layers.{{}}.{name}" for name in names] for ours, names in {
        **LAYER, "attn_norm": ["input_layernorm"], "attn.q_norm": ["self_attn.q_norm"],
        "attn.k_norm": ["self_attn.k_norm"]}.items()}
META = {"embed": ["tok_embeddings"], "norm": ["norm"], "unembed": ["output"]} | {
    f"blocks.{{}}.{ours}": [f"layers.{{}}.{name}" for name in names] for ours, names in {
        "attn_norm": ["attention_norm"], "attn.qkv": [f"attention.w{x}" for x in "qkv"], "attn.out": ["attention.wo"],
        "ffn_norm": ["ffn_norm"], "ffn.gate_up": ["feed_forward.w1", "feed_forward.w3"],
        "ffn.down": ["feed_forward.w2"]}.items()}
EAGLE = {"embed": ["embed_tokens"], "fc": ["fc"], "norm": ["norm"], "unembed": ["lm_head"],
         "token_norm": ["midlayer.input_layernorm"], "feature_norm": ["midlayer.hidden_norm"]} | {
    ours: [f"midlayer.{name}" for name in names] for ours, names in LAYER.items()}


def pieces(config, layout, name, shape):
    """[(published name, its shape), ...] of one of our parameters, from its first row on."""
    layer = re.search(r"\d+", name)
    key = name.removesuffix(".weight")
    sources = layout[key.replace(layer[0], "{}") if layer else key]
    rows = [shape[0] // len(sources)] * len(sources)
    if key.endswith("qkv"):
        rows = [heads * config.head_dim for heads in (config.heads, config.kv_heads, config.kv_heads)]
    return [(source.format(layer and layer[0]) + ".weight", (n, *shape[1:])) for source, n in zip(sources, rows)]


def read_json(path, *keys):
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        [contents[key] for key in keys]
        return contents
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged or not what its name says ({type(error).__name__}: {error})") from None


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
    """Sizes that the files get wrong or leave out (head_dim, target_hidden_size) are read off the tensors. The rotary
    base is 10000 unless rope_theta is there, and never scaled: that is how EAGLE trains, whatever the target does.
    num_hidden_layers is ignored, some files say the target's; there is one."""
    c = read_json(path / "config.json", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    draft_vocab_size, heads = c.get("draft_vocab_size") or c["vocab_size"], c["num_attention_heads"]
    needed = ["fc.weight", "midlayer.self_attn.q_proj.weight"] + ["d2t"] * (draft_vocab_size < c["vocab_size"])
    if not tensors.keys() >= set(needed):
        raise UserError(f"{path} is no EAGLE-3 head: it needs {', '.join(needed)}")
    target_dim = tensors["fc.weight"][0].shape[1] // 3
    return HeadConfig(
        vocab_size=c["vocab_size"], draft_vocab_size=draft_vocab_size, dim=c["hidden_size"],
        heads=heads, kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=len(tensors["midlayer.self_attn.q_proj.weight"][0]) // heads, ffn_dim=c["intermediate_size"],
        max_len=c.get("max_position_embeddings", 2048), norm_eps=c.get("rms_norm_eps", 1e-6),
        rope_theta=c.get("rope_theta", 10000.0), target_dim=target_dim,
        own_embedding="embed_tokens.weight" in tensors or c["hidden_size"] != target_dim)
