"""Corpus, tokenizer and batches: what goes in comes out, nothing leaks into validation, bad input is one line."""
import json
import os
import random
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken.load

from gto.checkpoint import load_encoding
from gto.data import (PIECE, Corpus, collect, cut_prompts, ensure_data, prepare, read_conversations,
                      read_prompts, split)
from gto.tokenizer import (LLAMA3_PATTERN, StreamDecoder, merge_pair, read_own_meta, read_ranks,
                           save_ranks, token_bytes, train_bpe)
from gto.util import UserError

GOLDENS = Path(__file__).resolve().parents[2] / "shared" / "goldens"
needs_goldens = pytest.mark.skipif(not GOLDENS.is_dir(), reason="reference outputs of other programs are not here")
STDLIB = Path(sysconfig.get_paths()["stdlib"])
INPUTS = [str(STDLIB / "asyncio"), str(STDLIB / "email")]
TEXT = "naïve café 日本語 😀 e\u0301  def f(x):\n        return x + 12345\r\n<|end_of_text|>\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("data"))
    prepare(out, inputs=INPUTS, vocab_size=512)
    return out


def sides(val_fraction=.05):    # train, validation: {name: text}
    return [dict(documents) for documents in split(collect(None, INPUTS), val_fraction)]


def brute_force_bpe(texts, vocab_size):
    words = Counter(word for text in texts for word in regex.findall(LLAMA3_PATTERN, text))
    words = [([bytes([b]) for b in word.encode()], count) for word, count in words.items()]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size:
        counts = Counter()
        for word, count in words:
            for left, right in zip(word, word[1:]):
                counts[left + right] += count
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        ranks.setdefault(best, len(ranks))
        words = [(merge_pair(word, best), count) for word, count in words]
    return ranks


def test_trainer_equals_counting_everything_again_at_each_merge():
    rng = random.Random(0)
    texts = ["".join(rng.choice(["a", "ab", "ba", "aa", "é", " ", "abc", "\n", "7"]) for _ in range(400))
             for _ in range(5)]
    ranks = train_bpe(texts, 330, LLAMA3_PATTERN)
    assert len(ranks) == 330 and ranks == brute_force_bpe(texts, 330)
    assert len(train_bpe(["abc xyz"], 400, LLAMA3_PATTERN)) == 256, "it stops when nothing repeats"


def test_rank_file_is_tiktokens(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    ranks = tiktoken.load.load_tiktoken_bpe(f"{folder}/tokenizer.model")
    assert len(ranks) == 511 and all(ranks[bytes([b])] == b for b in range(256))
    assert ranks == read_ranks(f"{folder}/tokenizer.model")
    save_ranks(tmp_path / "again", ranks)
    assert (tmp_path / "again").read_bytes() == Path(folder, "tokenizer.model").read_bytes()


def test_round_trip_at_once_and_token_by_token(folder):
    encoding = load_encoding(folder)
    ids = encoding.encode_ordinary(TEXT)
    assert encoding.decode(ids) == TEXT and max(ids) < 511 and len(ids) < len(TEXT.encode())
    assert encoding.encode("<|end_of_text|>", allowed_special="all") == [511] and encoding.n_vocab == 512
    decoder = StreamDecoder(encoding)
    parts = [decoder.push([token]) for token in ids]
    assert "".join(parts) == TEXT and "" in parts and decoder.finish() == ""          # held back till complete
    decoder.push([0xF0])
    assert decoder.finish() == token_bytes(encoding, 10**6).decode() == "\ufffd"


def write_hugging_face(path, ranks, **changes):
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {b: chr(b) for b in printable}
    alphabet |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in printable)}
    config = {"added_tokens": [{"id": len(ranks), "content": "<|endoftext|>"}], "normalizer": None,
              "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                  {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False},
                  {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]},
              "model": {"type": "BPE", "vocab": {"".join(alphabet[b] for b in t): r for t, r in ranks.items()}}}
    path.write_text(json.dumps(config | changes), encoding="utf-8")


def test_hugging_face_file_equals_its_rank_file(folder, tmp_path):
    own, ranks, path = load_encoding(folder), read_ranks(f"{folder}/tokenizer.model"), tmp_path / "tokenizer.json"
    write_hugging_face(path, ranks)
    encoding = load_encoding(tmp_path)
    assert encoding.encode_ordinary(TEXT) == own.encode_ordinary(TEXT)
    assert encoding.encode("<|endoftext|>", allowed_special="all") == [511]

    write_hugging_face(path, ranks, normalizer={"type": "NFC"})
    composed = load_encoding(path)
    assert composed.encode_ordinary("e\u0301") == composed.encode_ordinary("é") != encoding.encode_ordinary("e\u0301")
    assert composed.encode("e\u0301") == composed.encode("é")

    prepare(tmp_path / "out", inputs=INPUTS[:1], tokenizer=str(path))       # the normaliser survives in meta.json
    assert load_encoding(tmp_path / "out").encode_ordinary("e\u0301") == composed.encode_ordinary("é")

    for broken in ({"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": {"type": "Metaspace"}},
                   {"model": {"type": "Unigram", "vocab": []}}, {"model": {"vocab": {"a": 0}}}):
        write_hugging_face(path, ranks, **broken)
        with pytest.raises(UserError):
            load_encoding(path)


@pytest.mark.parametrize("text", ["", "short\n", "x" + " " * 300_000 + "y", "line of text\n" * 100_000])
def test_pieces_keep_the_text_and_bound_the_length(text):
    pieces = PIECE.findall(text)
    assert "".join(pieces) == text and max(map(len, pieces), default=0) <= 100_000
    assert " " in text[1:2] or all(piece.endswith("\n") for piece in pieces)


@needs_goldens
@pytest.mark.parametrize("file", ["tok_llama3style/tokenizer.json", "tok_qwenstyle/tokenizer.json"])
def test_byte_level_goldens(file):
    golden = json.loads((GOLDENS / file).with_name("examples.json").read_text(encoding="utf-8"))
    encoding = load_encoding(GOLDENS / file)
    for example in golden["examples"]:
        ids = encoding.encode(example["text"], allowed_special="all")
        assert ids == example["ids"]
        assert encoding.encode_ordinary(example["text"]) == example["ids_specials_as_text"]
        decoder = StreamDecoder(encoding)
        assert "".join(decoder.push([i]) for i in ids) + decoder.finish() == encoding.decode(ids) == example["decoded"]
    for example in golden["partial_decodes"]:
        assert encoding.decode(example["ids"]) == example["decoded_replace"]


@needs_goldens
def test_sentencepiece_goldens(tmp_path):
    pytest.importorskip("sentencepiece")
    golden = json.loads((GOLDENS / "tok_sentencepiece" / "examples.json").read_text(encoding="utf-8"))
    encoding = load_encoding(GOLDENS / "tok_sentencepiece")
    assert encoding.n_vocab == golden["vocab_size"]
    for example in golden["examples"]:
        assert encoding.encode_ordinary(example["text"]) == example["ids"]
        assert encoding.decode(example["ids"]) == example["decoded"]
        streamed = StreamDecoder(encoding).push(example["ids"])
        assert streamed == " " + example["decoded"] or not example["decoded"]      # the dummy blank in front
    hi = encoding.encode_ordinary("hi")
    assert encoding.encode("hi</s>hi", allowed_special="all") == hi + [golden["eos"]] + hi
    prepare(tmp_path / "out", inputs=[str(STDLIB / "json")], tokenizer=str(GOLDENS / "tok_sentencepiece"))
    corpus = Corpus(tmp_path / "out")
    assert corpus.eot_id == golden["eos"] and corpus.encoding.encode_ordinary("hi") == hi


def test_every_document_to_train_on_comes_back(folder):
    corpus = Corpus(folder)
    tokens, (documents, held_out) = corpus.tokens.tolist(), sides()
    assert tokens[-1] == corpus.eot_id and tokens.count(corpus.eot_id) == len(documents) > len(held_out) > 0
    assert corpus.encoding.decode(tokens) == "".join(text + "<|end_of_text|>" for text in documents.values())
    assert read_own_meta(folder)["dtype"] == "uint16" and corpus.tokens.dtype == np.uint16


def test_preparing_twice_gives_the_same_bytes(folder, tmp_path):
    prepare(tmp_path, inputs=INPUTS, vocab_size=512)
    first, again = ({path.name: path.read_bytes() for path in Path(out).iterdir()} for out in (folder, tmp_path))
    assert first == again and first.keys() == {"meta.json", "prompts.jsonl", "tokenizer.model", "train.bin"}


def test_split_is_by_name_alone():
    documents = [(f"file{i}", "text\n" * 9) for i in range(400)]
    train, val = (dict(side) for side in split(documents, .1))
    assert not train.keys() & val.keys() and len(train) + len(val) == 400 and 15 < len(val) < 75
    fewer_train, fewer_val = (dict(side) for side in split(documents[::2], .1))
    assert fewer_val.keys() <= val.keys() and fewer_train.keys() <= train.keys()


def test_a_single_document_is_cut():
    text = "".join(f"line {i}\n" for i in range(1000))
    (_, train), (_, val) = (side[0] for side in split([("one", text)], .1))
    assert train + val == text and train.endswith("\n") and .05 < len(val) / len(text) < .15


def test_prompts_are_held_out_and_varied(folder):
    _, val = sides()
    prompts = read_prompts(f"{folder}/prompts.jsonl")
    records = [json.loads(line) for line in Path(folder, "prompts.jsonl").read_text().splitlines()]
    assert len({text for (text,) in prompts}) == len(prompts) == len(records) == 128
    assert all(100 <= len(text) <= 300 and text in val[record["source"]] for (text,), record in zip(prompts, records))
    assert {record["source"] for record in records} == {name for name, text in val.items() if len(text) >= 100}
    assert cut_prompts(list(val.items()), seed=1) != cut_prompts(list(val.items()), seed=2)
    assert prompts[:5] == read_prompts(f"{folder}/prompts.jsonl", limit=5)


def test_batches_are_windows_and_depend_on_seed_and_step_only(folder):
    corpus = Corpus(folder)
    batch = corpus.batch(step=7, batch_size=16, length=32, seed=3)
    assert batch.shape == (16, 33) and str(batch.dtype) == "torch.int64"
    assert batch.equal(Corpus(folder).batch(7, 16, 32, 3))
    assert not batch.equal(corpus.batch(8, 16, 32, 3)) and not batch.equal(corpus.batch(7, 16, 32, 4))
    stream = corpus.tokens.tobytes()
    assert all(row.numpy().astype(np.uint16).tobytes() in stream for row in batch)
    size = len(corpus.tokens)
    assert corpus.batch(0, 2, size - 1)[1].tolist() == corpus.tokens.tolist()         # the only window
    with pytest.raises(UserError, match="a window"):
        corpus.batch(0, 2, size)


def test_missing_data_is_prepared_from_the_standard_library(tmp_path, monkeypatch):
    assert "lib/argparse.py" in dict(collect("stdlib"))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": INPUTS[0]})        # a part of it: all takes seconds
    ensure_data(tmp_path / "new", "stdlib", 300)
    corpus = Corpus(tmp_path / "new")
    assert corpus.vocab_size == 300 and len(corpus.tokens) > 1000
    assert read_own_meta(tmp_path / "new")["dataset"] == "stdlib"
    with pytest.raises(UserError, match="300, not 400"):
        ensure_data(tmp_path / "new", "stdlib", 400)
    os.truncate(tmp_path / "new" / "train.bin", 1000)
    with pytest.raises(UserError, match="only a part"):
        ensure_data(tmp_path / "new", "stdlib", 300)


def test_python_sources_are_filtered_and_copies_dropped(tmp_path, monkeypatch):
    lib, site = tmp_path / "lib", tmp_path / "site"
    files = {lib / "a.py": "a = 1", lib / "test" / "b.py": "b = 1", lib / "c.txt": "no",
             lib / "big.py": "#" * 1_000_001, lib / "site-packages" / "d.py": "d = 1", lib / "empty.py": "\n",
             site / "copy.py": "a = 1", site / "pkg" / "e.py": "e = 1", site / "pkg" / "also_e.py": "e = 1"}
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (lib / "latin.py").write_bytes(b"# caf\xe9")
    paths = {"stdlib": str(lib), "purelib": str(site), "platlib": str(site)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    assert collect("stdlib") == [("lib/a.py", "a = 1")]
    assert collect("python") == [("lib/a.py", "a = 1"), ("site-packages/pkg/also_e.py", "e = 1")]


def test_chat_formats(tmp_path):
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, (
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"turns": ["Hi", "there"]}))))
    answered, asked = [("user", "Hi"), ("assistant", "Hello")], [("user", "Hi"), ("user", "there")]
    assert read_conversations(tmp_path / "chat.jsonl") == [answered, answered, asked]
    assert read_conversations(tmp_path / "chat.jsonl", limit=1) == [answered]


def test_directories(tmp_path):
    (tmp_path / "src" / ".git").mkdir(parents=True)
    (tmp_path / "src" / "a.txt").write_text("alpha")
    (tmp_path / "src" / ".git" / "hidden").write_text("hidden")
    (tmp_path / "src" / "picture").write_bytes(b"\x89PNG\xff\x00")
    (tmp_path / "one.txt").write_text("one \u2028 line", encoding="utf-8")
    documents = collect(None, [str(tmp_path / "src"), str(tmp_path / "one.txt")])
    assert documents == [("one.txt", "one \u2028 line"), ("src/a.txt", "alpha")]
