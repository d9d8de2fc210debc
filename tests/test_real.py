"""Training a head for a released target: conversations, parts of a batch, several processes."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import decode
import train
from gto import training
from gto.bench import ablate
from gto.checkpoint import load_config, load_encoding
from gto.config import Config
from gto.loss import OBJECTIVES, learnt_positions
from gto.model import ModelConfig, Target
from gto.released import chat
from gto.training import Stage, Texts, copy_of, train_head
from gto.util import UserError
from tests.test_data import write_hugging_face
from tests.test_load import hugging_face_release, randomize, write_release
from tests.tiny import run_here as run, tiny_models

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT.parent / "shared" / "goldens"
TINY = "--length 224 --draft-vocab-size 300 --unroll 2 --tree 3,3,8 --groups 3 --group-size 4 --warmup 2".split()
TRAIN = ["--target", "Llama", "--data", "chat.jsonl", *TINY, "--head-steps", 12, "--gto-steps", 3, "--head-lr", 0.01,
         "--stage", "gto"]


def talk(*turns):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}


NAMES = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
LLAMA3 = [{"id": 256 + i, "content": f"<|{NAMES.get(i, f'reserved_{i}')}|>"} for i in range(256)]


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A random target as downloaded, and conversations: a token is a byte, or one of Llama 3's special ones."""
    folder = tmp_path_factory.mktemp("release")
    config = ModelConfig(vocab_size=512, layers=3, dim=24, heads=4, kv_heads=2, head_dim=6, ffn_dim=32, tied=False)
    write_release(folder / "Llama", *hugging_face_release(randomize(Target(config))))
    write_hugging_face(folder / "Llama/tokenizer.json", {bytes([i]): i for i in range(256)}, added_tokens=LLAMA3)
    talks = [talk(f"What is {i} + {i}?" + " Say it at length." * (i % 3), f"It is {2 * i}. " + "Really. " * i, "Sure?",
                  "Yes.") for i in range(8)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in talks))
    return folder


def test_what_is_learnt_is_what_the_assistant_wrote(release, tmp_path):
    encoding = load_encoding(release / "Llama")
    llama = chat.load(release / "Llama", encoding)
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
    tokens, supervised = chat.encode_conversations(file, llama, length=200, room=3)
    assert tokens.shape == supervised.shape == (3, 203)
    assert [encoding.decode(row[learnt].tolist()) for row, learnt in zip(tokens, supervised)][:2] == [
        "Hello!<|eot_id|>Goodbye.<|eot_id|>", "Hello!<|eot_id|>"]
    assert "left over" not in encoding.decode(tokens[1].tolist()) and "Be brief." in encoding.decode(tokens[0].tolist())
    assert encoding.decode(tokens[2][supervised[2]].tolist()).startswith("12345678901")
    assert supervised[2, 199] and not supervised[:, 200:].any(), "cut at `length`"
    for line, message in ('{"turns": ["a question"]}', "no answer"), ('{"messages": [{"role": "user"}]}', "line 1"):
        file.write_text(line)
        with pytest.raises(UserError, match=message):
            chat.encode_conversations(file, llama, 200, 3)


def test_a_chain_is_learnt_inside_one_answer_only():
    supervised = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) < 0.8
    found = learnt_positions(supervised, unroll=3)
    assert found.shape == (3, 15, 4) and found.any() and not found.all()
    for b, r, j in torch.cartesian_prod(*map(torch.arange, found.shape)):
        assert found[b, r, j] == supervised[b, r + 1:r + 2 + j + 1].all()


def train_once(out, tokens, supervised, batch, objective=None, **changes):
    """Two steps of the head. Returns what they changed in its parameters, and the last logged loss."""
    target, start = tiny_models(seed=4, draft_vocab=20)
    numbers = dict(tree="3,3,8", groups=3, group_size=4, unroll=2, head_muon_lr=0.0, head_lr=1e-2, omega=5.0)
    config, head = Config(**numbers | changes), copy_of(start, target)
    train_head(Stage("x", steps=2, batch=batch, seed=7), config, target, head, Texts(tokens, supervised, []), out,
               *(OBJECTIVES[objective], start) if objective else ())
    change = [(after - before).detach().flatten() for after, before in zip(head.parameters(), start.parameters())]
    return torch.cat(change), json.loads((out / "log.jsonl").read_text().splitlines()[-2])["loss"]


@pytest.fixture(scope="module")
def answers():
    """Texts of different lengths, padded; a question, an answer, a question, an answer."""
    generator = torch.Generator().manual_seed(3)
    texts, supervised = torch.zeros(6, 42, dtype=torch.int32), torch.zeros(6, 42, dtype=torch.bool)
    for i, length in enumerate((18, 40, 25, 33, 21, 37)):
        texts[i, :length] = torch.randint(29, (length,), generator=generator)
        supervised[i, 4:10] = supervised[i, 14:length] = True
    return texts, supervised


@pytest.mark.parametrize("objective", [None, "gto"])
def test_accumulated_parts_equal_the_larger_batch_and_padding_changes_nothing(tmp_path, answers, objective):
    tokens, supervised = answers
    whole, loss = train_once(tmp_path, tokens, supervised, 4, objective)
    assert whole.abs().max() > 1e-3
    padded = torch.cat([tokens, torch.randint(29, (6, 9), dtype=torch.int32)], dim=1)
    for again, again_loss in (
            # One row at a time is cut to its own length, a batch of four to that of its longest row.
            train_once(tmp_path, tokens, supervised, 1, objective, accumulate=4),
            train_once(tmp_path, padded, torch.nn.functional.pad(supervised, (0, 9)), 4, objective)):
        torch.testing.assert_close(again, whole, atol=2e-5, rtol=1e-4)
        assert again_loss == pytest.approx(loss, abs=2e-5)


def test_what_the_target_makes_of_a_text_is_kept_or_computed_anew(tmp_path, answers, monkeypatch):
    kept, _ = train_once(tmp_path, *answers, 4)
    texts = Texts(*answers, [])
    training.see(tiny_models()[0], texts)
    assert len(texts.seen) == 6
    monkeypatch.setattr(training, "KEPT_BYTES", 0)
    torch.testing.assert_close(train_once(tmp_path, *answers, 4)[0], kept, atol=2e-5, rtol=1e-4)


def test_what_stands_after_the_last_answer_is_not_learnt(tmp_path, answers):
    tokens, supervised = answers
    whole, _ = train_once(tmp_path, tokens, supervised, 2)
    assert not supervised[:, -2:].any()
    other = tokens.clone()
    other[~supervised.flip(1).cumsum(1).flip(1).bool()] = 5
    torch.testing.assert_close(train_once(tmp_path, other, supervised, 2)[0], whole, atol=2e-5, rtol=1e-4)


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


# What torchrun does, but the ranks part when what takes seconds to import is there.
RANKS = """import os, socket, sys
import torch._dynamo, train
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
rank = str(int(os.fork() == 0))
os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
               "RANK": rank, "LOCAL_RANK": rank}
train.main()
assert rank == "1" or os.wait()[1] == 0"""


def test_two_processes_equal_one_with_the_doubled_batch(trained):
    flags = [*TRAIN, "--head-batch", 1, "--gto-batch", 1, "--out-dir", "two", "--device", "cpu"]
    result = subprocess.run([sys.executable, "-c", RANKS, *map(str, flags)], cwd=trained, capture_output=True,
                            text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
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


@pytest.mark.soak                                                 # 20 to 40 seconds, mostly of starting processes
def test_an_interrupted_run_of_two_processes_goes_on(release):
    command = torchrun(ROOT / "train.py", *TRAIN, "--stage", "draft", "--head-steps", 230, "--accumulate", 1,
                       "--out-dir", "cut")
    with subprocess.Popen(command, cwd=release, stderr=subprocess.DEVNULL) as process:
        deadline = time.time() + 120
        while not (release / "cut/draft.partial.pt").exists() and time.time() < deadline and process.poll() is None:
            time.sleep(0.05)
        process.terminate()
    before = len(records(release / "cut", "draft"))
    result = subprocess.run(command, cwd=release, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert [line["step"] for line in records(release / "cut", "draft")[before:]] == [210, 220, 230]


@pytest.mark.parametrize("file", ["Llama", "tiny.gguf"])
def test_without_data_the_target_writes_its_own_conversations(release, file, capsys):
    """All of `train.py --target smollm2` at a hundredth of the size."""
    if file == "tiny.gguf":
        pytest.importorskip("gguf")
        from tests.test_gguf import SHAPE, write_gguf
        write_gguf(release / file, randomize(Target(SHAPE)))
    small = ["--target", file, *TINY, "--texts", 20, "--text-batch", 16, "--eval-prompts", 10, "--eval-tokens", 6,
             "--head-steps", 12, "--gto-steps", 2]
    run(train, *small, cwd=release)
    out = release / "out" / file.removesuffix(".gguf")
    written = (out / "chats.jsonl").read_text(encoding="utf-8").splitlines()
    question, answer = (message["content"] for message in json.loads(written[0])["messages"])
    printed = capsys.readouterr().out
    assert f"> {question}\n{answer}" in printed and "gto - control" in printed and "9 of 9 texts" in printed
    run(decode, "--target", file, "--chat", "--prompt", "Who?", "--tree", "3,3,8", "--max-new-tokens", 12, "--compare",
        cwd=release)
    assert "the same tokens" in capsys.readouterr().err and load_config(out).texts == 20
    ablate.main(["--target", str(release / file), "--chat", "--out-dir", str(out), "--only", "control", "--seeds", "1"])
    assert "| gto | 1 | 2 |" in capsys.readouterr().out
    if file == "Llama":                                           # interrupted in the second batch's answers
        (out / "chats.jsonl").unlink(), (out / "text.pt").unlink()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(StopIteration):
            parts = iter([chat.write] * 3)
            patch.setattr(chat, "write", lambda *arguments: next(parts)(*arguments))
            run(train, *small, "--stage", "text", cwd=release)
        begun = (out / "chats.jsonl").read_text(encoding="utf-8").splitlines()
        run(train, *small, "--stage", "text", cwd=release)
        again = (out / "chats.jsonl").read_text(encoding="utf-8").splitlines()
        assert again == written and len(again) == 20 > len(begun) and begun == written[:len(begun)]


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
