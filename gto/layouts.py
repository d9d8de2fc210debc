"""What published files call things: tensor names and config keys, of targets (Meta, Hugging Face) and EAGLE-3 heads."""
import json

from gto.errors import UserError
from gto.head import HeadConfig
from gto.model import ModelConfig

# Tensors --------------------------------------------------------------------------------------------------------

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


def pieces(config, layout, name, shape):
    """[(published name, its shape), ...] of one of our parameters."""
    number = next((part for part in name.split(".") if part.isdigit()), "")
    sources = [source.format(number) for source in layout[name.replace(number, "{}", 1) if number else name]]
    if name.endswith("qkv.weight"):
        rows = [config.heads * config.head_dim] + 2 * [config.kv_heads * config.head_dim]
    else:
        rows = [shape[0] // len(sources)] * len(sources)
    return [(source, (n, *shape[1:])) for source, n in zip(sources, rows)]


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
        rope_theta=c.get("rope_theta", 10000.0), target_dim=tensors["fc.weight"][0].shape[-1] // 3,
        own_embedding="embed_tokens.weight" in tensors)


def read_json(path, *keys):
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        for key in keys:
            contents[key]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged or not what its name says ({type(error).__name__}: {error})") from None
    return contents
