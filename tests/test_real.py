"""Training a head for a released target: conversations, parts of a batch, several processes."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import decode
import train
from gto import chat, stages
from gto.bpe import save_ranks
from gto.config import Config
from gto.conversations import encode_conversations
from gto.errors import UserError
from gto.model import ModelConfig, Target
from gto.tokenizer import load_encoding
from tests.test_load import hugging_face_release, randomize, write_release
from tests.tiny import tiny_models

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT.parent / "shared" / "goldens"
TINY = "--length 224 --draft-vocab-size 300 --unroll 2 --tree 3,3,8 --groups 3 --group-size 4 --warmup 2".split()


TRAIN = ["--target", "Llama", "--data", "chat.jsonl", *TINY, "--head-steps", 12, "--gto-steps", 3, "--head-lr", 0.01]


def talk(*turns):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A folder with a random target as downloaded, and conversations: a token is a byte, or one of Llama 3's special."""
    folder = tmp_path_factory.mktemp("release")
    config = ModelConfig(vocab_size=512, layers=3, dim=24, heads=4, kv_heads=2, head_dim=6, ffn_dim=32, tied=False)
    write_release(folder / "Llama", *hugging_face_release(randomize(Target(config))))
    save_ranks(folder / "Llama/tokenizer.model", {bytes([i]): i for i in range(256)})
    talks = [talk(f"What is {i} + {i}?" + " Say it at length." * (i % 3), f"It is {2 * i}. " + "Really. " * i, "Sure?",
                  "Yes.") for i in range(8)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in talks))
    return folder


# Conversations -----------------------------------------------------------------------------------------------------

def test_what_is_learnt_is_what_the_assistant_wrote(release, tmp_path):
    encoding = load_encoding(release / "Llama")
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(map(json.dumps, [
        {"messages": [{"role": "system", "content": "Be brief."},
                      *talk("Hi", "Hello!", "Bye", " Goodbye. ")["messages"]]},
        {"conversations": [{"from": "gpt", "value": "left over"}, {"from": "human", "value": "Hi"},
                           {"from": "gpt", "value": "Hello!"}, {"from": "human", "value": "Bye"},
                           {"from": "human", "value": "Hello?"}]},
        {"turns": ["a question", "nobody answers"]},
        {"messages": []},
        talk("Count", "1234567890" * 20)])))
    texts = encode_conversations(file, encoding, length=200, room=3)
    tokens, supervised = texts["tokens"], texts["supervised"]
    assert tokens.shape == supervised.shape == (3, 203)
    assert [encoding.decode(row[learnt].tolist()) for row, learnt in zip(tokens, supervised)][:2] == [
        "Hello!<|eot_id|>Goodbye.<|eot_id|>", "Hello!<|eot_id|>"]
    assert "left over" not in encoding.decode(tokens[1].tolist()) and "Be brief." in encoding.decode(tokens[0].tolist())
    assert encoding.decode(tokens[2][supervised[2]].tolist()).startswith("12345678901")
    assert supervised[2, 199] and not supervised[:, 200:].any(), "cut at `length`"
    expected, _ = chat.encode("llama3", talk("Count", "1234567890" * 20)["messages"], encoding)
    assert tokens[2, :200].tolist() == expected[:200]
    file.write_text('{"turns": ["a question"]}')
    with pytest.raises(UserError, match="no answer"):
        encode_conversations(file, encoding, 200, 3)
    file.write_text('{"messages": [{"role": "user"}]}')
    with pytest.raises(UserError, match="line 1"):
        encode_conversations(file, encoding, 200, 3)


def test_a_chain_is_learnt_inside_one_answer_only():
    supervised = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) < 0.8
    found = stages.learnt_places(supervised, unroll=3)
    assert found.shape == (3, 15, 4) and found.any() and not found.all()
    for b in range(3):
        for r in range(15):
            for j in range(4):
                assert found[b, r, j] == supervised[b, r + 1:r + 2 + j + 1].all()


# Parts of a batch --------------------------------------------------------------------------------------------------

def train_once(tmp_path, texts, supervised, batch, reference=None, **changes):
    """Two steps of the head. Returns its parameters and the last logged loss."""
    target, start = tiny_models(seed=4, draft_vocab=20)
    config = Config(**{**dict(tree="3,3,8", groups=3, group_size=4, unroll=2, head_muon_lr=0.0, head_lr=1e-2), **changes})
    head = stages.copy_of(start, target)
    stages.train_head("x", config, target, head, texts, 2, 1.0, batch, 7, tmp_path,
                      reference=start if reference else None, supervised=supervised)
    figures = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    return torch.cat([p.detach().flatten() for p in head.parameters()]), figures["loss"], start


@pytest.fixture(scope="module")
def answers():
    """Texts of different lengths, padded; a question, an answer, a question, an answer."""
    generator = torch.Generator().manual_seed(3)
    texts, supervised = torch.zeros(6, 42, dtype=torch.int32), torch.zeros(6, 42, dtype=torch.bool)
    for i, length in enumerate((18, 40, 25, 33, 21, 37)):
        texts[i, :length] = torch.randint(29, (length,), generator=generator)
        supervised[i, 4:10] = supervised[i, 14:length] = True
    return texts, supervised


@pytest.mark.parametrize("reference", [False, True], ids=["phase I", "GTO"])
def test_accumulated_parts_equal_the_larger_batch_and_padding_changes_nothing(tmp_path, answers, reference):
    texts, supervised = answers
    whole, loss, start = train_once(tmp_path, texts, supervised, 4, reference, omega=5.0)
    assert (whole - torch.cat([p.detach().flatten() for p in start.parameters()])).abs().max() > 1e-3
    # One row at a time is cut to its own length, a batch of four to that of its longest row.
    parts, parts_loss, _ = train_once(tmp_path, texts, supervised, 1, reference, omega=5.0, accumulate=4)
    torch.testing.assert_close(parts, whole, atol=2e-5, rtol=1e-4)
    assert parts_loss == pytest.approx(loss, abs=2e-5)
    noise = torch.randint(29, (6, 9), dtype=torch.int32)
    padded, padded_loss, _ = train_once(tmp_path, torch.cat([texts, noise], dim=1),
                                        torch.nn.functional.pad(supervised, (0, 9)), 4, reference, omega=5.0)
    torch.testing.assert_close(padded, whole, atol=2e-5, rtol=1e-4)
    assert padded_loss == pytest.approx(loss, abs=2e-5)


def test_what_stands_after_the_last_answer_is_not_learnt(tmp_path, answers):
    texts, supervised = answers
    whole, _, _ = train_once(tmp_path, texts, supervised, 2)
    assert not supervised[:, -2:].any()
    other = texts.clone()
    other[~supervised.flip(1).cumsum(1).flip(1).bool()] = 5
    changed, _, _ = train_once(tmp_path, other, supervised, 2)
    torch.testing.assert_close(changed, whole, atol=2e-5, rtol=1e-4)
    less = supervised.clone()
    less[:, 14:] = False
    assert (train_once(tmp_path, texts, less, 2)[0] - whole).abs().max() > 1e-3


# Programs ----------------------------------------------------------------------------------------------------------

def run(program, *arguments, cwd):
    """train.py or decode.py, in this process: importing torch anew takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, arguments), "--device", "cpu"])
        program.main()


def torchrun(*arguments):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, arguments),
            "--device", "cpu"]


def records(out, stage):
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["stage"] == stage and "step" in line]


@pytest.fixture(scope="module")
def trained(release):
    """Phase I and GTO in one process, two texts a batch."""
    run(train, *TRAIN, "--head-batch", 2, "--gto-batch", 2, "--out-dir", "one", cwd=release)
    return release


def test_train_a_released_target_then_decode(trained, capsys):
    files = {p.name for p in (trained / "one").iterdir()}
    assert files == {"config.json", "log.jsonl", "text.pt", "draft.pt", "gto.pt"}
    run(decode, "--target", "Llama", "--head", "one/gto.pt", "--chat", "--prompt", "What is 2 + 2?", "--tree",
        "3,3,8", "--max-new-tokens", 12, "--compare", cwd=trained)
    assert "the same tokens" in capsys.readouterr().err


def test_two_processes_with_a_spread_target_equal_one_with_the_doubled_batch(trained):
    result = subprocess.run(torchrun(ROOT / "train.py", *TRAIN, "--head-batch", 1, "--gto-batch", 1, "--out-dir", "two",
                                     "--spread"), cwd=trained, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    for stage in "draft", "gto":
        one, two = records(trained / "one", stage), records(trained / "two", stage)
        assert [line["step"] for line in one] == [line["step"] for line in two], "rank 0 alone writes"
        for expected, found in zip(one, two):
            assert all(found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-4) for key in expected
                       if key not in ("stage", "seconds"))
        weights = [torch.load(trained / out / f"{stage}.pt", weights_only=True)["model"] for out in ("one", "two")]
        for name, expected in weights[0].items():
            torch.testing.assert_close(weights[1][name], expected, atol=1e-3, rtol=1e-3)


def test_a_killed_process_ends_the_run_and_the_next_one_goes_on(release):
    command = torchrun(ROOT / "train.py", *TRAIN, "--stage", "draft", "--head-steps", 230, "--out-dir", "killed")
    with subprocess.Popen(command, cwd=release, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.time() + 120
        while not (release / "killed/draft.partial.pt").exists() and time.time() < deadline and process.poll() is None:
            time.sleep(0.05)
        listed = subprocess.check_output(["ps", "-A", "-o", "ppid=,pid="], text=True).splitlines()
        children = [int(child) for parent, child in map(str.split, listed) if int(parent) == process.pid]
        assert len(children) == 2, process.stderr.read()
        os.kill(children[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "Signal 9" in errors
    # The other one says so, too, unless torchrun ends it before it comes to the next exchange.
    assert "lost another process" in errors or "Signal 15" in errors
    before = len(records(release / "killed", "draft"))
    result = subprocess.run([*command, "--resume"], cwd=release, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert [line["step"] for line in records(release / "killed", "draft")[before:]] == [210, 220, 230]


def test_decoding_with_a_split_target_gives_the_same_text(trained, capsys):
    arguments = ["--target", "Llama", "--head", "one/gto.pt", "--chat", "--prompt", "Hi", "--tree", "3,3,8",
                 "--max-new-tokens", 24]
    run(decode, *arguments, cwd=trained)
    result = subprocess.run(torchrun(ROOT / "decode.py", *arguments), cwd=trained, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.decode() == capsys.readouterr().out and len(result.stdout) > 10
    assert result.stderr.count(b"tokens/s") == 1


@pytest.mark.skipif(not GOLDENS.is_dir(), reason="needs the peers' files in ../shared/goldens")
def test_gto_from_a_published_head(release, tmp_path, capsys):
    pytest.importorskip("safetensors")
    target = GOLDENS / "eagle_target"
    run(train, "--target", target, "--head", GOLDENS / "eagle_head_narrow", "--data", release / "chat.jsonl", *TINY,
        "--gto-steps", 2, "--out-dir", "out", cwd=tmp_path)
    assert not (tmp_path / "out/draft.pt").exists()
    run(decode, "--target", target, "--head", "out/gto.pt", "--chat", "--prompt", "Who are you?",
        "--max-new-tokens", 12, "--compare", cwd=tmp_path)
    assert "the same tokens" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["--target", "Llama"], "--data chat.jsonl"),
    (["--target", "nowhere", "--data", "chat.jsonl"], "nowhere does not exist"),
    (["--target", "Llama", "--data", "chat.jsonl", "--spread"], "torchrun"),
    (["--target", "Llama", "--data", "chat.jsonl", "--stage", "table"], "gto.bench"),
    (["--spread"], "--target FOLDER"),
])
def test_bad_input_is_one_clear_line(release, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        run(train, *arguments, "--out-dir", "bad", cwd=release)
    assert "\n" not in str(caught.value) and not (release / "bad").exists()
