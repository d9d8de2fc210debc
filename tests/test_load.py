"""Loading of published weights in every layout, errors for damaged ones, and the export of heads."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gto import checkpoint
from gto.errors import UserError
from gto.export import export
from gto.head import DraftHead, HeadConfig
from gto.load import load_head, load_target
from gto.model import ModelConfig, Prefix, Target, rotary_frequencies
from gto.tree import TreeShape, draft_tree

ROOT = Path(__file__).resolve().parents[1]
# dim 24: 2 * 4 * 24 / 3 = 64, rounded up to a multiple of 48 gives Meta's feed-forward width of 96.
LLAMA = ModelConfig(vocab_size=40, layers=3, dim=24, heads=4, kv_heads=4, head_dim=6, ffn_dim=96, max_len=8192,
                    rope_theta=5e5, tied=False)
HEAD = HeadConfig(vocab_size=40, draft_vocab_size=20, target_dim=24, dim=24, heads=4, kv_heads=2, head_dim=6,
                  ffn_dim=32)


def randomize(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.4
    return module


def random_head(config, target):
    head = randomize(DraftHead(config, target), seed=1)
    generator = torch.Generator().manual_seed(2)
    head.token_ids = torch.randperm(config.vocab_size, generator=generator)[:config.draft_vocab_size].sort().values
    return head


def hugging_face_release(target):
    """config.json and tensors as transformers 4 writes them."""
    c = target.config
    config = {"model_type": "qwen3" if c.qk_norm else "llama", "vocab_size": c.vocab_size, "hidden_size": c.dim,
              "num_hidden_layers": c.layers, "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads,
              "head_dim": c.head_dim, "intermediate_size": c.ffn_dim, "max_position_embeddings": c.max_len,
              "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta, "rope_scaling": None,
              "tie_word_embeddings": c.tied}
    tensors = {"model.embed_tokens.weight": target.embed.weight, "model.norm.weight": target.norm.weight}
    if not c.tied:
        tensors["lm_head.weight"] = target.unembed.weight
    for i, block in enumerate(target.blocks):
        q, k, v = block.attn.qkv.weight.split([c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim])
        gate, up = block.ffn.gate_up.weight.chunk(2)
        layer = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
                 "self_attn.o_proj": block.attn.out.weight, "mlp.gate_proj": gate, "mlp.up_proj": up,
                 "mlp.down_proj": block.ffn.down.weight, "input_layernorm": block.attn_norm.weight,
                 "post_attention_layernorm": block.ffn_norm.weight}
        if c.qk_norm:
            layer |= {"self_attn.q_norm": block.attn.q_norm.weight, "self_attn.k_norm": block.attn.k_norm.weight}
        tensors |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    return config, {name: tensor.detach().clone() for name, tensor in tensors.items()}


def write_release(folder, config, tensors, shards=1, safetensors=False):
    folder.mkdir(parents=True, exist_ok=True)
    stem, suffix = ("model", "safetensors") if safetensors else ("pytorch_model", "bin")
    save = pytest.importorskip("safetensors.torch").save_file if safetensors else torch.save
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save(tensors, folder / f"{stem}.{suffix}")
        return folder
    weight_map = {name: f"{stem}-{i % shards + 1:05}-of-{shards:05}.{suffix}" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_meta_release(folder, target, shards, embedding_axis):
    """params.json and consolidated.NN.pth: rotary pairs are neighbours, weights cut as for Meta's parallel layers."""
    c = target.config
    _, tensors = hugging_face_release(target)
    names = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
             "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
             "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "ffn_norm", "embed_tokens": "tok_embeddings", "lm_head": "output"}
    files = [{"rope.freqs": torch.zeros(c.head_dim // 2)} for _ in range(shards)]
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            half = c.head_dim // 2   # row j + half of a head moves behind row j
            order = torch.tensor([j + part * half for j in range(half) for part in (0, 1)])
            tensor = tensor.view(-1, c.head_dim, c.dim)[:, order].reshape(tensor.shape)
        for theirs, metas in names.items():
            name = name.replace(theirs, metas)
        name = name.removeprefix("model.")
        by_columns = name.endswith(("wo.weight", "w2.weight")) or "tok_embeddings" in name and embedding_axis == 1
        parts = [tensor] * shards if tensor.dim() == 1 else tensor.chunk(shards, dim=int(by_columns))
        for file, part in zip(files, parts):
            file[name] = part.clone()
    folder.mkdir(parents=True, exist_ok=True)
    for i, file in enumerate(files):
        torch.save(file, folder / f"consolidated.{i:02}.pth")
    (folder / "params.json").write_text(json.dumps({
        "dim": c.dim, "n_layers": c.layers, "n_heads": c.heads, "vocab_size": -1, "multiple_of": 48,
        "norm_eps": c.norm_eps, "rope_theta": c.rope_theta, "some_later_key": 1}))
    return folder


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def error_of(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Targets --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("safetensors", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("changes", [
    {}, {"kv_heads": 2, "tied": True}, {"kv_heads": 1, "qk_norm": True, "head_dim": 10}])
def test_hugging_face_release_gives_back_the_weights(tmp_path, changes, shards, safetensors):
    target = randomize(Target(replace(LLAMA, **changes)))
    loaded = load_target(write_release(tmp_path, *hugging_face_release(target), shards, safetensors))
    assert loaded.config == target.config
    assert same_weights(loaded, target)
    assert (loaded.unembed.weight is loaded.embed.weight) == target.config.tied
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("shards, embedding_axis", [(1, 0), (2, 0), (4, 0), (2, 1), (4, 1)])
def test_meta_release_gives_back_the_weights(tmp_path, shards, embedding_axis):
    target = randomize(Target(LLAMA))
    loaded = load_target(write_meta_release(tmp_path, target, shards, embedding_axis))
    assert loaded.config == target.config
    assert same_weights(loaded, target)


@pytest.mark.parametrize("rope, theta, scaling", [
    ({"rope_theta": 7e4}, 7e4, None),
    ({}, 1e4, None),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
     5e5, (8.0, 1.0, 4.0, 8192)),
    ({"rope_parameters": {"rope_theta": 3e4, "rope_type": "default"}}, 3e4, None)])
def test_rotary_settings_of_both_config_dialects(tmp_path, rope, theta, scaling):
    config, tensors = hugging_face_release(randomize(Target(LLAMA)))
    del config["rope_theta"], config["rope_scaling"]
    target = load_target(write_release(tmp_path, config | rope, tensors))
    assert (target.config.rope_theta, target.config.rope_scaling) == (theta, scaling)
    torch.testing.assert_close(target.frequencies, rotary_frequencies(target.config))


def test_bfloat16_leaves_the_rotary_frequencies_alone(tmp_path):
    original = randomize(Target(LLAMA))
    folder = write_release(tmp_path / "release", *hugging_face_release(original))
    checkpoint.save_model(tmp_path / "target.pt", original)
    for path in folder, tmp_path / "target.pt":
        target = load_target(path, dtype=torch.bfloat16)
        assert all(torch.equal(p, q.bfloat16()) for p, q in zip(target.parameters(), original.parameters()))
        assert torch.equal(target.frequencies, rotary_frequencies(LLAMA))


def test_tensors_that_do_not_fit_are_named(tmp_path):
    config, tensors = hugging_face_release(randomize(Target(LLAMA)))
    name = "model.layers.1.mlp.up_proj.weight"
    without = {k: v for k, v in tensors.items() if k != name}
    assert f"missing: {name}" in error_of(load_target, write_release(tmp_path, config, without))
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(24)}
    assert "q_proj.bias" in error_of(load_target, write_release(tmp_path, config, tensors | bias))
    message = error_of(load_target, write_release(tmp_path, config, tensors | {name: torch.zeros(95, 24)}))
    assert f"{name} [95, 24], not [96, 24]" in message
    assert "and 24 more" in error_of(load_target, write_release(tmp_path, config | {"num_hidden_layers": 6}, tensors))


def test_damaged_and_foreign_files_give_one_line(tmp_path):
    config, tensors = hugging_face_release(randomize(Target(LLAMA)))
    assert "no target at" in error_of(load_target, tmp_path / "nowhere")
    folder = write_release(tmp_path, config, tensors)
    weights = folder / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:-500])
    assert "cut short" in error_of(load_target, folder)
    torch.save({"step": 3, **tensors}, weights)
    assert "more than tensors" in error_of(load_target, folder)
    weights.unlink()
    assert "no weights" in error_of(load_target, folder)
    write_release(folder, config, tensors, shards=3)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    assert "00002-of-00003.bin is missing" in error_of(load_target, folder)
    for changes, words in (({"model_type": "mamba"}, "'mamba'"), ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn'")):
        (folder / "config.json").write_text(json.dumps(config | changes))
        assert words in error_of(load_target, folder)
    (folder / "config.json").write_text("{")
    assert "config.json is damaged" in error_of(load_target, folder)


def test_own_checkpoints_say_what_they_are(tmp_path):
    target = randomize(Target(LLAMA))
    head = random_head(HEAD, target)
    checkpoint.save_model(tmp_path / "target.pt", target)
    checkpoint.save_model(tmp_path / "head.pt", head)
    assert same_weights(load_target(tmp_path / "target.pt"), target)
    assert same_weights(load_head(tmp_path / "head.pt", target), head)
    assert "holds a head" in error_of(load_target, tmp_path / "head.pt")
    assert "holds a target" in error_of(load_head, tmp_path / "target.pt", target)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "head.pt").read_bytes()[:-200])
    assert "cut short" in error_of(load_head, tmp_path / "cut.pt", target)


def test_without_safetensors_the_error_names_the_package(tmp_path, monkeypatch):
    folder = write_release(tmp_path, *hugging_face_release(randomize(Target(LLAMA))), safetensors=True)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in error_of(load_target, folder)


# Heads ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def trees(head, features, tokens):
    n = features.shape[1]
    hidden, keys, values = head(head.fuse(features), tokens, torch.arange(n)[None])
    cache = head.new_cache(1, n)
    cache.commit([keys], [values], torch.zeros(1, dtype=torch.long))
    prefix = Prefix(cache, torch.tensor([n]))
    return [draft_tree(head, hidden[:, -1], tokens[:, -1], prefix, shape, 0.7)
            for shape in (TreeShape(4, 3, 12), TreeShape(1, 4, 4))]


@pytest.mark.parametrize("safetensors", [False, True])
@pytest.mark.parametrize("changes", [
    {}, {"draft_vocab_size": 40}, {"dim": 16, "head_dim": 4, "own_embedding": True},
    {"rope_theta": 5e5, "head_dim": 8}])
def test_exported_head_drafts_identical_trees(tmp_path, changes, safetensors):
    if safetensors:
        pytest.importorskip("safetensors")
    target = randomize(Target(LLAMA))
    config = replace(HEAD, **changes)
    head = random_head(config, target)
    checkpoint.save_model(tmp_path / "head.pt", head)
    export(tmp_path / "head.pt", tmp_path / "eagle", safetensors=safetensors)
    assert not list((tmp_path / "eagle").glob("*.tmp"))
    again = load_head(tmp_path / "eagle", target)
    assert again.config == config
    assert same_weights(again, head)
    generator = torch.Generator().manual_seed(3)
    features, tokens = torch.randn(1, 7, 72, generator=generator), torch.randint(40, (1, 7), generator=generator)
    for one, other in zip(trees(head, features, tokens), trees(again, features, tokens)):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_export_writes_eagles_own_tensors(tmp_path):
    """In and out again, a head that EAGLE trained is its old self: names, shapes, d2t and t2d included."""
    published = torch.load(ROOT / "tests/fixtures/goldens.pt", weights_only=True)["eagle"]
    target = Target(replace(LLAMA, vocab_size=512, dim=48, head_dim=12))
    head = load_head(write_release(tmp_path / "in", published["config"], published["weights"]), target)
    checkpoint.save_model(tmp_path / "head.pt", head)
    export(tmp_path / "head.pt", tmp_path / "out", torch.float16)
    written = torch.load(tmp_path / "out/pytorch_model.bin", weights_only=True)
    assert written.keys() == published["weights"].keys()
    for name, tensor in published["weights"].items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor)
    config = json.loads((tmp_path / "out/config.json").read_text())
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
                "vocab_size", "draft_vocab_size", "rms_norm_eps", "torch_dtype", "hidden_act", "model_type"):
        assert config[key] == published["config"][key]


def test_head_for_another_target_is_refused(tmp_path):
    target = randomize(Target(LLAMA))
    checkpoint.save_model(tmp_path / "head.pt", random_head(HEAD, target))
    folder = export(tmp_path / "head.pt", tmp_path / "eagle").parent
    wide = Target(replace(LLAMA, dim=48))
    for path in folder, tmp_path / "head.pt":
        assert "another target" in error_of(load_head, path, wide)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save(tensors | {"d2t": tensors["d2t"] + 30}, folder / "pytorch_model.bin")
    assert "d2t points outside" in error_of(load_head, folder, target)
    torch.save({k: v for k, v in tensors.items() if k != "d2t"}, folder / "pytorch_model.bin")
    assert "needs a d2t" in error_of(load_head, folder, target)
    torch.save({k: v for k, v in tensors.items() if k != "fc.weight"}, folder / "pytorch_model.bin")
    assert "no EAGLE-3 head" in error_of(load_head, folder, target)
    assert "cannot make the folder" in error_of(export, tmp_path / "head.pt", tmp_path / "head.pt")


@pytest.mark.parametrize("arguments, words", [(["no.pt", "out"], "no.pt"), (["--size", "3"], "--help")])
def test_export_ends_with_one_line(tmp_path, arguments, words):
    run = subprocess.run([sys.executable, "-m", "gto.export", *arguments], cwd=tmp_path, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1 and words in run.stderr
    assert not (tmp_path / "out").exists()
