"""From documents to batches: collect them, split them by file, encode them, and serve training windows.
A data directory holds train.bin (flat token ids, the end-of-text token behind each document), the
tokenizer.model, prompts.jsonl (like MT-bench's question.jsonl), and meta.json, written last: then it is complete."""
import hashlib
import json
import os
import random
import re
import sysconfig
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gto.checkpoint import load_encoding
from gto.tokenizer import END_OF_TEXT, LLAMA3_PATTERN, make_encoding, read_own_meta, save_tokenizer, train_bpe
from gto.util import UserError, reading, write_whole

DEFAULT_VOCAB_SIZE = 2048
BPE_SAMPLE_CHARS = 20_000_000       # more text does not change a small vocabulary, but costs time
PROMPT = 64                         # tokens of a held-out prompt, at most
# Parts of a text to give to tiktoken, whose regex can exhaust the stack: not too long, cut after a line where possible.
PIECE = re.compile(r"(?s).{1,100000}\Z|.{0,99999}\n|.{100000}")
GENERATED_CHARS = 1_000_000         # a longer source file was written by a program
# Tests and tables are code that nobody would complete by hand.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"}


def collect(dataset, inputs=None):
    """The documents, (name, text), of a built-in dataset, or of `inputs` (files and directories) if given. Sorted by
    name, which decides on which side of the split one falls: it holds no path of the machine."""
    documents = []
    for root in (Path(os.path.abspath(path)) for path in inputs or ()):
        for file in root.rglob("*") if root.is_dir() else [root]:
            name = file.relative_to(root.parent).as_posix()
            text = read_text(file) if "/." not in name else ""                        # hidden
            if file == root and not text:
                raise UserError(f"--input {root}: no such file or directory, or no UTF-8 text")
            documents.append((name, text))
    if not inputs:
        paths = sysconfig.get_paths()
        documents = read_tree(paths["stdlib"], "lib", SKIPPED_FOLDERS)
        if dataset == "python":
            for folder in sorted({paths["purelib"], paths["platlib"]}):
                documents += read_tree(folder, "site-packages", set())
            name_of = {text: name for name, text in sorted(documents, reverse=True)}  # of copies the first stays
            documents = [(name, text) for text, name in name_of.items()]
    documents = sorted(document for document in documents if document[1].strip())
    if not documents:
        raise UserError(f"no text found in {inputs or 'the standard library'}: give text or code with --input")
    return documents


def read_tree(root, prefix, skipped):
    """The Python files below root, without folders named in `skipped` and generated files."""
    found = ((path.relative_to(root), path) for path in Path(root).rglob("*.py"))
    documents = [(f"{prefix}/{name.as_posix()}", read_text(path)) for name, path in found
                 if skipped.isdisjoint(name.parts) and "_sysconfigdata" not in path.name]  # which is the machine's
    return [(name, text) for name, text in documents if len(text) <= GENERATED_CHARS]


def read_text(path):
    """The file's text, nothing if it cannot be read as UTF-8 text."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        return "" if "\0" in text else text
    except (OSError, UnicodeDecodeError):
        return ""


def read_conversations(path, limit=None):
    """The first `limit` conversations of a chat .jsonl, [(role, text), ...] each; ShareGPT's human and gpt are user and
    assistant. A line has "messages" [{role, content}], "conversations" [{from, value}] or "turns" of the user."""
    roles, found = {"human": "user", "gpt": "assistant", "model": "assistant"}, []
    lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    for number, line in lines[:limit]:
        with reading(f'{path}, line {number}, expected as an object with "turns", "messages" or "conversations",'):
            record = json.loads(line)
            if "messages" in record:
                turns = [(turn["role"], turn["content"]) for turn in record["messages"]]
            elif "conversations" in record:
                turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
            else:
                turns = [("user", turn) for turn in record["turns"] + []]             # a list, nothing else
            if not all(isinstance(part, str) for turn in turns for part in turn):
                raise TypeError("what is no text")
            found.append([(roles.get(role, role), text) for role, text in turns])
    return found


def split(documents, val_fraction=.05):
    """(train, validation) documents, by a hash of the name: the same file falls on the same side in every dataset.
    A handful of documents cannot be divided so; then the last part of each is for validation."""
    train, val = [], []
    for document in documents:
        hashed = int(hashlib.sha256(document[0].encode()).hexdigest()[:8], 16)
        (val if hashed < val_fraction * 2**32 else train).append(document)
    if len(documents) < 20 or not train or not val:
        ends = [int(len(text) * (1 - val_fraction)) for _, text in documents]
        cuts = [text.rfind("\n", 0, end) + 1 or end for (_, text), end in zip(documents, ends)]
        train = [(name, text[:cut]) for (name, text), cut in zip(documents, cuts)]
        val = [(name, text[cut:]) for (name, text), cut in zip(documents, cuts)]
    return train, val


def cut_prompts(documents, count=128, seed=0):
    """Prompts of 100 to 300 characters from (name, text) documents, taking turns among them: whole lines, every
    second one from a def or class where there is one. Returns records of prompts.jsonl; fewer if text is short."""
    rng = random.Random(seed)
    documents = [document for document in documents if len(document[1]) >= 100]
    rng.shuffle(documents)
    prompts = {}
    for name, text in islice(cycle(documents), 10 * count):
        starts = [line.start() for line in re.finditer(r"^.*\S", text, re.MULTILINE)]
        heads = [line.start() for line in re.finditer(r"^[ \t]*(def|class) ", text, re.MULTILINE)]
        start = rng.choice(heads if heads and rng.random() < .5 else starts)
        end = text.find("\n", start + rng.randint(100, 240) - 1) + 1 or len(text)
        if end - start > 300:                                     # a long line: stop before a word
            end = max(text.rfind(" ", start, start + 300), start)
        if len(prompt := text[start:end].rstrip()) >= 100:
            prompts.setdefault(prompt, name)
        if len(prompts) == count:
            break
    return [{"question_id": i, "turns": [text], "source": name} for i, (text, name) in enumerate(prompts.items())]


def read_prompts(path, limit=None):
    """The first `limit` prompts of a question.jsonl (ours, MT-bench, HumanEval, GSM8K): each a list of user turns."""
    prompts = [[text for role, text in turns if role == "user" and text] for turns in read_conversations(path, limit)]
    if not prompts or [] in prompts:
        raise UserError(f'{path} holds no prompts, or an empty one: expected {{"turns": ["text", ...]}} on every line')
    return prompts


def prepare(out, dataset="stdlib", inputs=None, vocab_size=DEFAULT_VOCAB_SIZE, tokenizer=None):
    """Write the data directory `out` and return its meta. dataset, inputs: see `collect`. vocab_size: ids of a BPE
    trained here, with the end-of-text token (little text gives fewer); tokenizer: use this one."""
    encoding = load_encoding(tokenizer) if tokenizer is not None else None
    train, val = split(collect(dataset, inputs))
    out, ours = Path(out), read_own_meta(out) is not None
    for path in filter(Path.exists, (out / "meta.json", out / "tokenizer.model")):    # incomplete from here on
        if not ours:
            raise UserError(f"{path} is not of a data directory, but a model's perhaps: choose another --out")
        path.unlink()
    if encoding is None:
        stride = 1 + sum(len(text) for _, text in train) // BPE_SAMPLE_CHARS
        ranks = train_bpe([text for _, text in train[::stride]], vocab_size - 1, LLAMA3_PATTERN)
        encoding = make_encoding("trained here", LLAMA3_PATTERN, ranks, {END_OF_TEXT: len(ranks)})
    meta = save_tokenizer(out / "tokenizer.model", encoding)
    meta |= {"dataset": "input" if inputs else dataset, "dtype": "uint16" if encoding.n_vocab < 65536 else "uint32"}
    parts = []
    for _, text in tqdm(train, "encode", unit="doc", disable=None):
        ids = [token for piece in PIECE.findall(text) for token in encoding.encode_ordinary(piece)]
        parts.append(np.array([*ids, meta["eot_id"]], dtype=meta["dtype"]))
    tokens = np.concatenate(parts)
    write_whole(out / "train.bin", tokens)
    meta |= {"train_documents": len(train), "train_tokens": len(tokens), "held_out_documents": len(val)}
    write_whole(out / "prompts.jsonl", "".join(json.dumps(r) + "\n" for r in cut_prompts(val)))
    write_whole(out / "meta.json", json.dumps(meta, indent=1))
    return meta


class Corpus:
    """A prepared data directory: its `encoding`, its held-out prompts and random training windows."""

    def __init__(self, directory):
        self.directory, meta = directory, read_own_meta(directory) or {}
        with reading(f"{directory}, which python prepare_data.py --out {directory} writes,"):
            self.vocab_size, self.eot_id = meta["vocab_size"], meta["eot_id"]
            self.tokens = np.memmap(f"{directory}/train.bin", meta["dtype"], "r")     # [tokens]
            if len(self.tokens) != meta["train_tokens"] or self.tokens.max() >= self.vocab_size:
                raise UserError("it is only a part, or of another vocabulary")
        self.encoding, self.prompts = load_encoding(directory), read_prompts(Path(directory, "prompts.jsonl"))

    def prompt_ids(self, limit=None):
        """The first PROMPT tokens of the held-out prompts, a list of ids each."""
        return [self.encoding.encode_ordinary(turns[0])[:PROMPT] for turns in self.prompts[:limit]]

    def batch(self, step, batch_size, length, seed=0):
        """Windows of the text, int64 [batch_size, length + 1], inputs and targets; pure in (seed, step)."""
        if (room := len(self.tokens) - length) <= 0:
            raise UserError(f"{self.directory} has {len(self.tokens)} tokens, a window {length + 1}: add more text")
        starts = np.random.default_rng((seed, step)).integers(0, room, batch_size)    # [B]
        return torch.from_numpy(self.tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64))


def ensure_data(directory, dataset, vocab_size):
    """Prepare a built-in dataset if `directory` does not exist or is empty; what is there must have this vocab_size."""
    if not os.path.isdir(directory) or not os.listdir(directory):
        prepare(directory, dataset, vocab_size=vocab_size)
    if (found := Corpus(directory).vocab_size) != vocab_size:
        raise UserError(f"{directory} was prepared with --vocab-size {found}, not {vocab_size}: prepare it anew")
