"""Wrong command lines and wrong files, at every program: each ends with status 2 and one line that names the flag or
the file; nothing is overwritten, no folder stays behind, no code in a file is run."""
import argparse
import json
import os
import pickle
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import decode
import prepare_data
import train
from gto.bench import __main__ as bench
from gto.bench import ablate
from gto.checkpoint import finish, load_target, remember_config, save
from gto.config import Config
from gto.data import Corpus, prepare
from gto.ltd import __main__ as ltd
from gto.ltd.ppo import Learned, save_policy
from gto.policy import Space
from gto.released import export
from gto.tokenizer import save_ranks
from gto.util import main_guard
from kernels import bench as kernels_bench
from tests.test_data import write_hugging_face
from tests.test_load import hugging_face_release, write_release
from tests.test_real import LLAMA3
from tests.tiny import tiny_models

VOCAB = 300
CPU = ["--device", "cpu"]
PROGRAMS = {"train": train, "decode": decode, "prepare": prepare_data, "bench": bench, "ablate": ablate, "ltd": ltd,
            "export": export, "kernels": kernels_bench}
# What each program is given besides; `train` stops after its checks, as all its stages are finished.
USUAL = {"train": ["--data", "data", "--stage", "gto", "--draft-vocab-size", 200, *CPU],
         "decode": ["--prompt", "x", "--max-new-tokens", "4", *CPU],
         "prepare": ["--input", "words.txt", "--out", "new"],
         "bench": ["--limit", "0", "--max-new-tokens", "4", "--tree", "2,2,3", *CPU],
         "ablate": CPU, "ltd": CPU, "export": ["out/gto.pt"], "kernels": []}
RELEASED = ["--target", "Llama", "--data", "chat.jsonl", "--out-dir", "new", "--stage", "text", *CPU]
MAY_BE_ZERO = {"--seed", "--temperature", "--limit", "--top-k", "--head-ffn-dim", "--head-muon-lr", "--muon-lr",
               "--omega", "--delta", "--eps", "--unroll", "--warmup"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small run as train.py leaves it in out; begun: one interrupted in phase I; half: one without a control;
    Llama, eagle: a target and a head as downloaded."""
    root, config = tmp_path_factory.mktemp("malformed"), Config(draft_vocab_size=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        Path("words.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(900)))
        prepare("data", inputs=["words.txt"], vocab_size=VOCAB)
        target, head = tiny_models(vocab=VOCAB, draft_vocab=200)
        for out, names in (("out", "draft control gto gto-2"), ("half", "draft gto"), ("begun", "")):
            remember_config(Path(out), config, Corpus("data"))
            finish("target", target, Path(out), seconds=2.0)
            for name in names.split():
                finish(name, head, Path(out), seconds=2.0)
            save(f"{out}/text.pt", kind="text", tokens=torch.randint(VOCAB, (4, config.length)),
                 supervised=torch.ones(4, config.length, dtype=torch.bool))
        save("begun/draft.partial.pt", kind="training", model={"x": torch.zeros(1)}, optimizers=[], step=3, seconds=1.0)
        save_policy("out/policy-gto.pt", Learned(Space(2, 4, (0, 1, 8))), gain=0.1)
        write_release(Path("Llama"), *hugging_face_release(target))
        write_hugging_face(Path("Llama/tokenizer.json"), {bytes([i]): i for i in range(256)}, added_tokens=LLAMA3)
        save_ranks("Llama/tokenizer.model", {bytes([i]): i for i in range(256)})
        export.export("out/gto.pt", "eagle")
        Path("chat.jsonl").write_text(json.dumps({"conversations": [{"from": "human", "value": "Hi"},
                                                                    {"from": "gpt", "value": "Hello!"}]}))
        write_hugging_face(Path("other.json"), {bytes([i]): i for i in range(256)} | {b"xx": 999}, added_tokens=LLAMA3)
        Path("note").write_text("a note")
        Path("empty").mkdir()
    return root


@lru_cache(maxsize=None)
def contents(path, changed):
    return path.read_bytes()


@pytest.fixture
def attempt(folder, monkeypatch, capsys):
    """attempt(program, flags) -> exit status, stdout, stderr, files that have changed."""
    monkeypatch.chdir(folder)
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")

    def files():
        return {path: contents(path, path.stat().st_mtime_ns) if path.is_file() else None for path in folder.rglob("*")}

    def run(program, flags):
        before, status = files(), 0
        monkeypatch.setattr(sys, "argv", [program, *map(str, flags)])
        try:
            main_guard(PROGRAMS[program].main)
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr(), [str(path) for path, _ in before.items() ^ files().items()]

    return run


def refused(result, word):
    status, out, err, changed = result
    lines = [line for line in err.split("\n") if line and "\r" not in line]          # no progress bar
    assert status == 2 and len(lines) == 1 and word in lines[0], (status, out, err)
    assert "Traceback" not in out and not changed, changed


def parser_of(program):
    """A program's argparse parser."""
    def stop(parser, *_):
        raise StopIteration(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        try:
            PROGRAMS[program].main()
        except StopIteration as stopped:
            return stopped.value


def takes_numbers(action):
    try:
        return action.type is not bool and type(action.type("7")) in (int, float)
    except Exception:
        return False


def wrong_values():
    """(program, flag, values): every numeric flag of every program, and every choice."""
    for program in PROGRAMS:
        for action in parser_of(program)._actions:
            flag = (action.option_strings or [""])[-1]
            if action.choices or flag == "--debias":
                yield program, flag, ["nonsense", ""]
            elif takes_numbers(action):
                zero = [] if flag in MAY_BE_ZERO else ["0"]
                yield program, flag, ["nan", "inf", "-inf", "-1", "1e30", "1" + 30 * "0", "abc", "", "0x10", *zero]


def test_wrong_numbers_and_choices(attempt):
    table = list(wrong_values())
    assert len(table) > 50 and {program for program, *_ in table} >= {"train", "decode", "prepare", "bench", "ablate"}
    for program, flag, values in table:
        for value in values:
            refused(attempt(program, [*USUAL[program], flag, value]), flag)


DEVICES = [(program, ["--device", device], "--device") for program in ("train", "decode", "bench", "ablate", "ltd")
           for device in ("tpu", "", "meta", "cpu:7", "cuda:99", "cuda:x", "cuda" if not torch.cuda.is_available() else
                          "mps")]
TREES = [(program, ["--tree", tree], "--tree") for program in ("train", "decode", "bench", "ablate") for tree in (
    "10000000,5,10000000", "8,1000000,24", "8,5", "8,5,24,1", "a,b,c", "nan,1,1", "", "0,3,1", "-2,3,1", "2,3,0",
    "1,1,5", "2,2,99", "1,1000000,1", "1000,1,1", "8;5;24")]
PATHS = [(program, [flag, path], "tokenizer.model" if (flag, path) == (
    "--tokenizer", "missing.pt") else path[:20]) for program, flags in (
    ("decode", "--target --head --tokenizer"), ("bench", "--target --head --tokenizer --prompts"),
    ("train", "--data"), ("prepare", "--input --tokenizer")) for flag in flags.split()
    for path in ("missing", "missing.pt", "empty", "x" * 5000)]
OUT = [("train", ["--out-dir", "note"], "note"), ("train", ["--out-dir", "note/new"], "note"),
       ("decode", ["--out-dir", "note"], "note"), ("decode", ["--out-dir", "empty"], "empty"),
       ("bench", ["--out-dir", "note"], "note"), ("ablate", ["--out-dir", "note"], "note"),
       ("ltd", ["--out-dir", "note"], "note"), ("ltd", ["--out-dir", "missing"], "missing"),
       ("prepare", ["--out", "note"], "note"), ("prepare", ["--out", "out/../Llama"], "tokenizer.model"),
       ("export", ["note"], "note"), ("export", ["out"], "out"),
       ("export", ["Llama"], "Llama")]
SIZES = [("train", [f"--{name}", 10 ** 9], f"--{name}") for name in (
    "vocab-size", "length", "layers", "dim", "heads", "head-dim", "ffn-dim", "target-batch", "target-accumulate",
    "texts", "text-batch",
    "head-ffn-dim", "unroll", "head-batch", "gto-batch", "groups", "group-size", "accumulate", "eval-prompts",
    "eval-tokens", "prompt-length")] + [("train", ["--dim", 10 ** 6], "dim"), ("train", ["--ffn-dim", 10 ** 7], "dim")]
CONFLICTS = [
    ("decode", ["--prompt", ""], "empty prompt"), ("decode", ["--prompt", "x " * 5000], "prompt"),
    ("decode", ["--method", "ar", "--compare"], "--compare"), ("decode", ["--top-p", 7], "--top-p"),
    ("decode", ["--top-p", 0], "--top-p"), ("decode", ["--tree", "1,5,5", "--policy", "rule"], "--policy"),
    ("decode", ["--chat"], "chat template"), 
    ("decode", ["--tokenizer", "other.json", "--prompt", "xx"], "--tokenizer"),
    ("decode", ["--head", "out/target.pt"], "target.pt"), ("decode", ["--target", "out/gto.pt"], "gto.pt"),
    ("decode", ["--head", "Llama"], "Llama"), ("decode", ["--target", "eagle"], "eagle"),
    ("bench", ["--head", "a=out/gto.pt", "--head", "a=out/draft.pt"], "--head"),
    ("bench", ["--max-new-tokens", 1], "--max-new-tokens"), ("bench", ["--max-new-tokens", 500], "--max-new-tokens"),
    ("bench", ["--prompts", "words.txt"], "words.txt"), ("bench", ["--chat"], "chat template"),
    ("ablate", ["--only"], "--only"), ("ablate", ["--only", "x"], "--only"),
    ("prepare", ["--vocab-size", 256], "--vocab-size"), ("prepare", ["--tokenizer", "gpt2"], "gpt2"),
    ("prepare", ["--tokenizer", "gpt2", "--vocab-size", 300], "--vocab-size"),
    ("prepare", ["--input", "data/train.bin"], "train.bin"), ("export", ["a", "b", "c"], "c"), ("export", [], "folder"),
    ("train", ["--head", "out/gto.pt"], "--target"), ("train", ["--tokenizer", "Llama"], "--target"),
    ("train", ["--dataset", "nonsense"], "--dataset"),
    ("train", ["--objectives", "gto,nonsense"], "nonsense"),
    ("train", ["--aggregator", "median"], "--aggregator"), ("train", ["--heads", 3], "--heads"),
    ("train", ["--head-dim", 7], "--head-dim"), ("train", ["--length", 32], "--length"),
    ("train", ["--omega", 0.7, "--out-dir", "out"], "omega"), ("train", ["--eval-prompts", 3], "--eval-prompts"),
    ("train", ["--preset", "huge"], "--preset"), ("train", ["--data", "out"], "out"),
    ("train", [*RELEASED, "--data", "data"], "data"),
    ("train", [*RELEASED, "--data", "missing"], "missing"),
    ("train", [*RELEASED, "--target", "missing"], "missing"), ("train", [*RELEASED, "--target", "empty"], "empty"),
    ("train", [*RELEASED, "--target", "eagle"], "eagle"), ("train", [*RELEASED, "--head", "missing"], "missing"),
    ("train", [*RELEASED, "--head", "Llama"], "Llama"), ("train", [*RELEASED, "--tokenizer", "empty"], "empty"),
    *((program, ["--nonsense", "1"], "--nonsense") for program in PROGRAMS)]


@pytest.mark.parametrize("program", PROGRAMS)
def test_wrong_flags(attempt, program):
    for name, flags, word in DEVICES + TREES + PATHS + OUT + SIZES + CONFLICTS:
        if name == program:
            refused(attempt(program, [*USUAL[program], *flags]), word)


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch ran",)


def saved(contents):
    torch.save(contents, "temporary")
    try:
        return Path("temporary").read_bytes()
    finally:
        os.remove("temporary")


def changed(change):
    """-> a damage: a checkpoint with changed contents."""
    def damage(path):
        contents = torch.load(path, weights_only=True)
        change(contents)
        return saved(contents)
    return damage


def first_weight(change):
    def on_contents(contents):
        name = next(name for name, weight in contents["model"].items() if weight.is_floating_point())
        contents["model"][name] = change(contents["model"][name])
    return changed(on_contents)


# {name: a function of the path -> the bytes of a damaged file}
ANY = {"nothing": lambda path: b"", "a half": lambda path: path.read_bytes()[:path.stat().st_size // 2],
       "bytes": lambda path: bytes(range(256)) * 4, "zeros": lambda path: bytes(2000)}
CHECKPOINT = ANY | {
    "text": lambda path: b"no checkpoint", "code": lambda path: pickle.dumps(RunsCode()),
    "code inside": lambda path: saved({"kind": "target", "model": RunsCode()}),
    "a list": lambda path: saved([1, 2]), "another": lambda path: saved({"kind": "other"}),
    "no contents": lambda path: saved({"kind": torch.load(path, weights_only=True).get("kind")})}
MODEL = CHECKPOINT | {
    "NaN": first_weight(lambda w: w.fill_(float("nan"))), "inf": first_weight(lambda w: w.fill_(float("inf"))),
    "shorter": first_weight(lambda w: w[:-1]), "no tensor": first_weight(lambda w: "x")}
NETWORK = MODEL | {
    "more layers": changed(lambda c: c["config"].update(layers=9, dim=25)),
    "no layers": changed(lambda c: c["config"].update(layers=0, ffn_dim=0)),
    "unknown number": changed(lambda c: c["config"].update(colour=1)),
    "no number": changed(lambda c: c["config"].update(dim="x")),
    "a list of numbers": changed(lambda c: c.update(config=[1])), "no config": changed(lambda c: c.pop("config"))}
TEXT = CHECKPOINT | {
    "other ids": changed(lambda c: c["tokens"].fill_(VOCAB)), "negative": changed(lambda c: c["tokens"].fill_(-1)),
    "floats": changed(lambda c: c.update(tokens=c["tokens"] + 0.5)),
    "other shapes": changed(lambda c: c.update(supervised=c["supervised"][:-1])),
    "no texts": changed(lambda c: c.update(tokens=c["tokens"][:0], supervised=c["supervised"][:0])),
    "flat": changed(lambda c: c.update(tokens=c["tokens"][0], supervised=c["supervised"][0]))}
JSON = ANY | {text[:9]: lambda path, text=text: text.encode() for text in (
    "{", "[]", "3", "null", '{"a": 1}\n{"a": 1}', "[" * 100_000)}


def json_with(**changes):
    return {str(changes): lambda path: json.dumps(json.loads(path.read_text()) | changes).encode()}


CONFIG = JSON | json_with(layers="many") | json_with(omega=float("nan")) | json_with(tree=[8, 5, 24]) | json_with(
    tree="8,5") | json_with(eval_tokens=0) | json_with(colour="red") | json_with(heads=None)
META = JSON | json_with(pattern="(") | json_with(pattern=None) | json_with(special_tokens=["a"]) | json_with(
    special_tokens={"<|end_of_text|>": 5}) | json_with(vocab_size=100) | json_with(
    normalizer="Lowercase") | json_with(special_tokens={"<|end_of_text|>": "x"})
LOG = JSON | {"no stage": lambda path: b'{"stage": "other", "finished": true, "seconds": 2.0}\n',
              "no seconds": lambda path: path.read_bytes().replace(b'"seconds": 2.0', b'"seconds": "x"')}
LINES = JSON | {text[:20]: lambda path, text=text: text.encode("utf-8", "surrogateescape") for text in (
    '{"turns": "x"}', '{"turns": [3]}', '{"turns": [""]}', '{"messages": 3}', '{"messages": [{"role": "user"}]}',
    '{"conversations": [{"from": 1, "value": "x"}]}', '{"turns": ["\udcff"]}', '{"prompt": "x"}')}
LINE = len(b"AA== 0\n")
RANKS = ANY | {"not base64": lambda path: b"?? 0\n" + path.read_bytes()[LINE:],
               "no rank": lambda path: b"AA==\n" + path.read_bytes()[LINE:],
               "twice": lambda path: path.read_bytes() + b"AA== 300\n",
               "missing bytes": lambda path: path.read_bytes()[100 * LINE:],
               "a line less": lambda path: b"".join(path.read_bytes().splitlines(True)[:-1])}
TOKENS = {"nothing": ANY["nothing"], "a half": ANY["a half"], "other ids": lambda path: b"\xff" * path.stat().st_size}
HEAD, OUT_DIR = ["--head", "eagle"], ["--out-dir", "half", "--stage", "table"]
FILES = [  # file, the damages, the programs that read it, each with the flags for it
    ("out/target.pt", NETWORK, [("decode", []), ("train", []), ("bench", []), ("ablate", []), ("ltd", [])]),
    ("out/gto.pt", NETWORK, [("decode", []), ("bench", []), ("ltd", []), ("export", ["new"])]),
    ("out/draft.pt", NETWORK, [("train", ["--stage", "draft"]), ("ablate", [])]),
    ("out/policy-gto.pt", MODEL, [("decode", ["--policy", "ltd"])]),
    ("out/text.pt", TEXT, [("train", []), ("ablate", [])]),
    ("begun/draft.partial.pt", MODEL, [("train", ["--out-dir", "begun"])]),
    ("half/log.jsonl", LOG, [("train", OUT_DIR)]),
    ("out/config.json", CONFIG, [("train", []), ("ablate", []), ("ltd", [])]),
    ("out/meta.json", META, [("decode", []), ("bench", []), ("ablate", [])]),
    ("data/meta.json", META, [("train", [])]), ("data/meta.json", JSON, [("prepare", ["--out", "data"])]),
    ("out/prompts.jsonl", LINES, [("bench", []), ("ablate", [])]),
    ("data/prompts.jsonl", LINES, [("train", ["--out-dir", "new"])]),
    ("out/tokenizer.model", RANKS, [("decode", []), ("bench", []), ("ablate", [])]),
    ("data/tokenizer.model", RANKS, [("train", [])]),
    ("data/train.bin", TOKENS, [("train", ["--out-dir", "new", "--stage", "target"])]),
    ("chat.jsonl", LINES, [("train", RELEASED)]),
    ("Llama/config.json", JSON, [("decode", ["--target", "Llama"]), ("train", RELEASED)]),
    ("Llama/pytorch_model.bin", ANY, [("decode", ["--target", "Llama"]), ("train", RELEASED)]),
    ("eagle/config.json", JSON, [("decode", HEAD), ("bench", HEAD)]),
    ("eagle/pytorch_model.bin", CHECKPOINT, [("decode", HEAD), ("bench", HEAD)])]


@pytest.mark.parametrize("file, damages, readers", FILES, ids=[f"{file} {readers[0][0]}" for file, _, readers in FILES])
def test_damaged_files(folder, attempt, file, damages, readers):
    path = folder / file
    sound, word = path.read_bytes(), path.parent.name if file.startswith(("data", "eagle")) else path.name
    for name, damage in damages.items():
        try:
            path.write_bytes(damage(path))
            for program, flags in readers:
                refused(attempt(program, [*USUAL[program], *flags]), word)
        except AssertionError as error:
            raise AssertionError(f"{file}: {name}") from error
        finally:
            path.write_bytes(sound)


@pytest.mark.parametrize("package", ["gguf", "safetensors"])
def test_damaged_downloads(folder, attempt, package):
    """Each in a file of its own: the last one read stays mapped."""
    pytest.importorskip(package)
    target = load_target(folder / "out/target.pt")
    target.norm.weight[3] = float("nan")
    if package == "gguf":
        from tests.test_gguf import write_gguf
        whole = write_gguf(folder / "whole.gguf", target)
    else:
        whole = write_release(folder / "safe", *hugging_face_release(target), safetensors=True) / "model.safetensors"
    for number, damage in enumerate([Path.read_bytes, *ANY.values()]):
        path = folder / (f"{number}.gguf" if package == "gguf" else f"safe{number}/model.safetensors")
        if package == "safetensors":
            write_release(path.parent, *hugging_face_release(target), safetensors=True)
        path.write_bytes(damage(whole))
        name = path.relative_to(folder).parts[0]
        for program, flags in ("decode", []), ("train", RELEASED):
            refused(attempt(program, [*USUAL[program], *flags, "--target", name, "--tokenizer", "Llama"]), name)


ANSWERS = [  # what looks wrong, but is not
    *(["--prompt", prompt] for prompt in (
        "<|end_of_text|>", "<|endoftext|> </s> <|im_start|>", "\udcff", "\ud800\udc00", "\0", "\x1b[31m", " ", "\n",
        "\u202e", "e\u0301", "\U0010ffff", "%s{}\\", "--help "[2:], "日本語😀")),
    ["--seed", "0"], ["--seed", "4294967295"], ["--seed", "1", "--seed", "2"], ["--temperature", "0"],
    ["--temperature", "1e-9"], ["--temperature", "4e9"], ["--top-k", "4294967295", "--temperature", "1"],
    ["--top-p", "1e-9", "--temperature", "1"], ["--max-new-tokens", "1"], ["--max-new-tokens", "1000000"],
    ["--tree", "1,1,1"], ["--tree", " 2, 2,3"], ["--method", "ar", "--json"], ["--show-tree", "--tree", "8,9,60"],
    ["--policy", "ltd"]]


def test_what_only_looks_wrong(attempt):
    for flags in ANSWERS:
        status, out, err, changed = attempt("decode", [*USUAL["decode"], *flags])
        assert status == 0 and out and "Traceback" not in err and not changed, (flags, err)
    for program in "train", "export":
        status, _, err, changed = attempt(program, [*USUAL[program], *["exported"] * (program == "export")])
        assert status == 0 and len(changed) == 3 * (program == "export"), err
