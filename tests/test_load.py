"""Loading of published weights in every layout, errors for damaged ones, and the export of heads."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gto.checkpoint import finish, load_head, load_target
from gto.head import DraftHead, HeadConfig
from gto.model import ModelConfig, Target, rotary_frequencies
from gto.released import export
from gto.released.files import HUGGING_FACE, pieces
from gto.util import UserError

FIXTURE = Path(__file__).with_name("fixtures") / "goldens.pt"
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
    tensors = {}
    for name, weight in target.named_parameters():
        parts = pieces(c, HUGGING_FACE, name, weight.shape)
        rows = weight.detach().split([shape[0] for _, shape in parts])
        tensors |= {source: part.clone() for (source, _), part in zip(parts, rows)}
    return config, tensors


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


def same_model(one, other):
    """Numbers, weights, rotary frequencies."""
    weights, others = ({**model.state_dict(), "frequencies": model.frequencies} for model in (one, other))
    return (one.config == other.config and weights.keys() == others.keys()
            and all(torch.equal(weights[name], others[name]) for name in weights))


@pytest.fixture
def target():
    return randomize(Target(LLAMA))


def error_of(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("safetensors", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("changes", [
    {}, {"kv_heads": 2, "tied": True}, {"kv_heads": 1, "qk_norm": True, "head_dim": 10}])
def test_hugging_face_release_gives_back_the_weights(tmp_path, changes, shards, safetensors):
    target = randomize(Target(replace(LLAMA, **changes)))
    loaded = load_target(write_release(tmp_path, *hugging_face_release(target), shards, safetensors))
    assert same_model(loaded, target)
    assert (loaded.unembed.weight is loaded.embed.weight) == target.config.tied
    assert not any(p.requires_grad for p in loaded.parameters())


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("rope, theta, scaling", [
    ({}, 1e4, None), ({"rope_theta": 7e4, "rope_scaling": None}, 7e4, None),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}}, 5e5, (8.0, 1.0, 4.0, 8192)),
    ({"rope_parameters": {"rope_theta": 3e4, "rope_type": "default"}}, 3e4, None)])
def test_rotary_settings_of_both_config_dialects(tmp_path, target, rope, theta, scaling):
    config, tensors = hugging_face_release(target)
    del config["rope_theta"], config["rope_scaling"]
    loaded = load_target(write_release(tmp_path, config | rope, tensors))
    assert (loaded.config.rope_theta, loaded.config.rope_scaling) == (theta, scaling)
    torch.testing.assert_close(loaded.frequencies, rotary_frequencies(loaded.config))


def test_bfloat16_leaves_the_rotary_frequencies_alone(tmp_path, target):
    finish("target", target, tmp_path)
    for path in write_release(tmp_path / "release", *hugging_face_release(target)), tmp_path / "target.pt":
        loaded = load_target(path, dtype=torch.bfloat16)
        assert all(torch.equal(p, q.bfloat16()) for p, q in zip(loaded.parameters(), target.parameters()))
        assert torch.equal(loaded.frequencies, rotary_frequencies(LLAMA))


def test_tensors_that_do_not_fit_are_named(tmp_path, target):
    config, tensors = hugging_face_release(target)
    name = "model.layers.1.mlp.up_proj.weight"
    without = {k: v for k, v in tensors.items() if k != name}
    assert name in error_of(load_target, write_release(tmp_path, config, without))
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(24)}
    assert "q_proj.bias" in error_of(load_target, write_release(tmp_path, config, tensors | bias))
    message = error_of(load_target, write_release(tmp_path, config, tensors | {name: torch.zeros(95, 24)}))
    assert f"{name} is [95, 24], not [96, 24]" in message
    folder = write_release(tmp_path, config | {"num_hidden_layers": 6}, tensors)
    assert "27 weights are missing" in error_of(load_target, folder)


def test_damaged_and_foreign_files_give_one_line(tmp_path, target):
    config, tensors = hugging_face_release(target)
    assert "no target at" in error_of(load_target, tmp_path / "nowhere")
    folder = write_release(tmp_path, config, tensors)
    weights = folder / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:-500])
    assert "pytorch_model.bin is damaged" in error_of(load_target, folder)
    weights.unlink()
    assert "model.embed_tokens.weight" in error_of(load_target, folder)
    for changes, words in (({"model_type": "mamba"}, "'mamba'"), ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn'")):
        (folder / "config.json").write_text(json.dumps(config | changes))
        assert words in error_of(load_target, folder)
    (folder / "config.json").write_text("{")
    assert "config.json is damaged" in error_of(load_target, folder)


def test_own_checkpoints_say_what_they_are(tmp_path, target):
    head = random_head(HEAD, target)
    finish("target", target, tmp_path)
    finish("head", head, tmp_path)
    assert same_model(load_target(tmp_path / "target.pt"), target)
    assert same_model(load_head(tmp_path / "head.pt", target), head)
    assert "holds a head" in error_of(load_target, tmp_path / "head.pt")
    assert "holds a target" in error_of(load_head, tmp_path / "target.pt", target)


@pytest.mark.parametrize("changes", [
    {}, {"draft_vocab_size": 40}, {"dim": 16, "head_dim": 4, "own_embedding": True},
    {"rope_theta": 5e5, "head_dim": 8}])
def test_exported_head_comes_back(tmp_path, target, changes):
    head = random_head(replace(HEAD, **changes), target)
    finish("head", head, tmp_path)
    export.export(tmp_path / "head.pt", tmp_path / "eagle", torch.float32)
    assert {file.name for file in (tmp_path / "eagle").iterdir()} == {"config.json", "pytorch_model.bin"}
    assert same_model(load_head(tmp_path / "eagle", target), head)


def test_export_writes_eagles_own_tensors(tmp_path):
    """In and out again, a head that EAGLE trained is its old self: names, shapes, d2t and t2d included."""
    published = torch.load(FIXTURE, weights_only=True)["eagle"]
    target = Target(replace(LLAMA, vocab_size=512, dim=48, head_dim=12))
    head = load_head(write_release(tmp_path / "in", published["config"], published["weights"]), target)
    finish("head", head, tmp_path)
    export.export(tmp_path / "head.pt", tmp_path / "out")
    written = torch.load(tmp_path / "out/pytorch_model.bin", weights_only=True)
    assert written.keys() == published["weights"].keys()
    for name, tensor in published["weights"].items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor)
    config = json.loads((tmp_path / "out/config.json").read_text())
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
                "vocab_size", "draft_vocab_size", "rms_norm_eps", "torch_dtype", "hidden_act", "model_type"):
        assert config[key] == published["config"][key]


def test_head_for_another_target_is_refused(tmp_path, target):
    folder = tmp_path / "eagle"
    finish("head", random_head(HEAD, target), tmp_path)
    export.export(tmp_path / "head.pt", folder, torch.float32)
    wide = Target(replace(LLAMA, dim=48))
    for path in folder, tmp_path / "head.pt":
        assert "another target" in error_of(load_head, path, wide)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    for name, words in (("d2t", "KeyError('d2t')"), ("fc.weight", "KeyError('fc.weight')"), ("norm.weight", "missing")):
        torch.save({k: v for k, v in tensors.items() if k != name}, folder / "pytorch_model.bin")
        assert words in error_of(load_head, folder, target)


