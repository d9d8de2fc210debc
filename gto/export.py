"""Our draft head -> EAGLE-3's files, for EAGLE, SGLang and vLLM: python -m gto.export out/gto.pt FOLDER"""
import json
import os
from pathlib import Path

import torch

from gto import checkpoint
from gto.errors import UserError, argument_parser, main_guard
from gto.head import HeadConfig
from gto.layouts import EAGLE, pieces


def eagle_tensors(config, weights):
    """Our state dict -> {EAGLE's name: tensor}, the inverse of gto.load.load_head."""
    tensors = {}
    for name, weight in weights.items():
        if name != "token_ids":
            parts = pieces(config, EAGLE, name, weight.shape)
            rows = weight.split([shape[0] for _, shape in parts])
            tensors |= {source: part.contiguous().clone() for (source, _), part in zip(parts, rows)}
    if config.draft_vocab_size != config.vocab_size:
        ids = weights["token_ids"]
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    return tensors


def eagle_json(config, dtype):
    """config.json. SGLang and vLLM go by the architecture's name, EAGLE does not read it."""
    return {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": config.dim, "intermediate_size": config.ffn_dim, "num_hidden_layers": 1,
            "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
            "max_position_embeddings": config.max_len, "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
            "target_hidden_size": config.target_dim, "vocab_size": config.vocab_size,
            "draft_vocab_size": config.draft_vocab_size, "tie_word_embeddings": False,
            "torch_dtype": str(dtype).removeprefix("torch.")}


def export(source, folder, dtype=None, safetensors=False):
    """Write config.json and pytorch_model.bin (or model.safetensors). dtype None: as in the checkpoint."""
    contents = checkpoint.read(source, "head")
    config = HeadConfig(**contents["config"])
    if config.rope_scaling or config.qk_norm:
        raise UserError(f"{source} has rotary scaling or q/k norms: EAGLE-3's format has no place for them")
    if config.head_dim * config.heads != config.dim:
        print(f"note: head_dim {config.head_dim} is not {config.dim} / {config.heads}, EAGLE's own code cannot load it")
    tensors = eagle_tensors(config, contents["model"])
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None
    file = folder / ("model.safetensors" if safetensors else "pytorch_model.bin")
    write(folder / "config.json", lambda path: path.write_text(
        json.dumps(eagle_json(config, tensors["norm.weight"].dtype), indent=2) + "\n"))
    if safetensors:
        try:
            from safetensors.torch import save_file
        except ImportError:
            raise UserError("--safetensors needs a package: pip install safetensors") from None
        write(file, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    else:
        write(file, lambda path: torch.save(tensors, path))
    return file


def write(file, save):
    """Under a temporary name first: a reader finds the old file or the new one, never half of one."""
    temporary = file.with_name(file.name + ".tmp")
    save(temporary)
    os.replace(temporary, file)


def main():
    parser = argument_parser("python -m gto.export", __doc__.split(":")[0])
    parser.add_argument("head", help="checkpoint of a draft head, for example out/gto.pt")
    parser.add_argument("folder", help="where config.json and the weights are written")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"],
                        help="type of the weights (default: as in the checkpoint; published heads are float16)")
    parser.add_argument("--safetensors", action="store_true", help="write model.safetensors, not pytorch_model.bin")
    args = parser.parse_args()
    file = export(args.head, args.folder, args.dtype and getattr(torch, args.dtype), args.safetensors)
    print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB) and config.json beside it")


if __name__ == "__main__":
    main_guard(main)
