"""Our draft head -> EAGLE-3's files, for EAGLE, SGLang and vLLM: python -m gto.released.export out/gto.pt FOLDER"""
import json
from pathlib import Path
from types import SimpleNamespace

import torch

from gto import checkpoint
from gto.head import DraftHead, HeadConfig
from gto.released.files import EAGLE, pieces
from gto.util import UserError, argument_parser, main_guard, reading, write_whole


def export(source, folder, dtype=torch.float16):
    """Write config.json and pytorch_model.bin, the inverse of `load_head`. dtype: published heads are float16."""
    contents, tensors = checkpoint.read(source, "head"), {}
    if Path(folder, "config.json").exists():
        raise UserError(f"{folder} holds a model: choose another folder")
    with reading(source):
        config = HeadConfig(**contents["config"])
        head = DraftHead(config, SimpleNamespace(embed=None)).requires_grad_(False)
        head.load_state_dict(contents["model"])
    for name, weight in head.named_parameters():
        parts = pieces(config, EAGLE, name, weight.shape)
        rows = weight.to(dtype).split([shape[0] for _, shape in parts])
        tensors |= {source: part.clone() for (source, _), part in zip(parts, rows)}       # not a view of the whole
    if config.draft_vocab_size != config.vocab_size:
        tensors["d2t"] = head.token_ids - torch.arange(config.draft_vocab_size)
        tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill(0, head.token_ids, True)
    # SGLang and vLLM go by the architecture's name, EAGLE does not read it.
    write_whole(Path(folder) / "config.json", json.dumps({
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": config.dim, "intermediate_size": config.ffn_dim, "target_hidden_size": config.target_dim,
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
        "max_position_embeddings": config.max_len, "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
        "vocab_size": config.vocab_size, "draft_vocab_size": config.draft_vocab_size, "tie_word_embeddings": False,
        "num_hidden_layers": 1, "torch_dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n")
    checkpoint.save(Path(folder) / "pytorch_model.bin", **tensors)


def main():
    parser = argument_parser("python -m gto.released.export", __doc__.split(":")[0])
    parser.add_argument("head", help="checkpoint of a draft head, for example out/gto.pt")
    parser.add_argument("folder", help="where config.json and pytorch_model.bin are written")
    arguments = parser.parse_args()
    export(arguments.head, arguments.folder)
    print(f"wrote {arguments.folder}/pytorch_model.bin and config.json beside it")


if __name__ == "__main__":
    main_guard(main)
