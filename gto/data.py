"""From documents to batches: collect them, split them by file, encode them, and serve training windows.

A data directory holds train.bin and val.bin (token ids, flat; each document is followed by the end-of-text token),
tokenizer.model, prompts.jsonl (cut from validation documents, in the format of MT-bench's question.jsonl), and
meta.json (sizes, dtype, split pattern), which is written last: its presence says that the directory is complete.
"""
import hashlib
import json
import os
import random
import sysconfig
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gto.checkpoint import load_encoding
from gto.tokenizer import END_OF_TEXT, LLAMA3_PATTERN, make_encoding, read_own_meta, save_tokenizer, train_bpe
from gto.util import UserError, write_text, write_whole

DATASETS = ("stdlib", "python")
DEFAULT_VOCAB_SIZE = 2048
BPE_SAMPLE_CHARS = 20_000_000       # more text does not change a small vocabulary, but costs time
PROMPT = 64                         # tokens of a held-out prompt, at most
PIECE_CHARS = 100_000               # longest text given to tiktoken at once: its regex can exhaust the stack
GENERATED_CHARS = 1_000_000         # a longer source file was written by a program
# Tests and tables are code that nobody would complete by hand.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages",
                   "__pycache__"}


# Documents are (name, text). The name decides on which side of the split one falls: it holds no path of the machine --

def collect(dataset, inputs=None):
    """The documents of a built-in dataset, or of `inputs` (files and directories) if given. Sorted by name."""
    if inputs:
        documents = read_inputs(inputs)
    else:
        paths = sysconfig.get_paths()
        documents = read_tree(paths["stdlib"], "lib", SKIPPED_FOLDERS)
        if dataset == "python":
            for folder in sorted({paths["purelib"], paths["platlib"]}):
                documents += read_tree(folder, "site-packages", {"__pycache__"})
            name_of = {text: name for name, text in sorted(documents, reverse=True)}  # of copies the first stays
            documents = [(name, text) for text, name in name_of.items()]
    if not any(text.strip() for _, text in documents):
        raise UserError(f"no text found in {inputs or 'the standard library'}: give text or code with --input")
    return sorted(document for document in documents if document[1].strip())


def read_tree(root, prefix, skipped):
    """The Python files below root, without folders named in `skipped`, generated files and what is not UTF-8."""
    documents = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped]
        for path in (os.path.join(folder, name) for name in files):
            if path.endswith(".py") and "_sysconfigdata" not in path:             # that one describes the machine
                documents.append((f"{prefix}/{os.path.relpath(path, root)}".replace(os.sep, "/"), read_text(path)))
    return [(name, text) for name, text in documents if text is not None and len(text) <= GENERATED_CHARS]


def read_text(path):
    """The file's text, or None if it cannot be read as UTF-8 text."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return None if "\0" in text else text


def read_inputs(paths):
    """Documents of text files, chat .jsonl files (a document per line) and directories of both."""
    documents = []
    for path in paths:
        found = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names] or [path]
        for file in sorted(file for file in found if os.sep + "." not in file.removeprefix(path)):
            text = read_text(file)
            if text is None and file == path:
                raise UserError(f"--input {path}: no such file or directory, or not UTF-8 text")
            name = os.path.relpath(file, os.path.dirname(os.path.abspath(path))).replace(os.sep, "/")
            if text is not None and file.endswith(".jsonl"):
                documents += [(f"{name}:{i}", render_chat(line, f"{file}, line {i}"))
                              for i, line in enumerate(text.split("\n"), 1) if line.strip()]
            elif text is not None:
                documents.append((name, text))
    return documents


def render_chat(line, where):
    """One line of a chat .jsonl as plain text, 'User: ...' and 'Assistant: ...'."""
    turns = read_turns(line, where)
    if turns and turns[0][0] == "text":
        return turns[0][1]
    return "\n\n".join(f"{role.capitalize()}: {text.strip()}" for role, text in turns) + "\n"


def read_turns(line, where):
    """One line of a chat .jsonl -> [(role, text)]; ShareGPT's human and gpt are user and assistant. `where` is for the
    error. Knows "messages" [{role, content}], "conversations" [{from, value}], "turns" of the user, and "text"."""
    roles = {"human": "user", "gpt": "assistant", "model": "assistant"}
    try:
        record = json.loads(line)
        if "text" in record:
            turns = [("text", record["text"])]
        elif "messages" in record:
            turns = [(turn["role"], turn["content"]) for turn in record["messages"]]
        elif "conversations" in record:
            turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
        else:
            turns = [("user", turn) for turn in record["turns"] + []]                 # a list, nothing else
        if not all(isinstance(part, str) for turn in turns for part in turn):
            raise TypeError
        return [(roles.get(role, role), text) for role, text in turns]
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{where}: expected an object with "text", "turns", "messages" or "conversations"') from None


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
    documents = [(name, text.splitlines(keepends=True)) for name, text in documents if len(text) >= 100]
    rng.shuffle(documents)
    prompts = {}
    for attempt in range(10 * count if documents else 0):
        name, lines = documents[attempt % len(documents)]
        starts = [i for i, line in enumerate(lines) if line.strip()]
        heads = [i for i in starts if lines[i].lstrip().startswith(("def ", "class "))]
        start = rng.choice(heads if heads and rng.random() < .5 else starts)
        length, text = rng.randint(100, 240), ""
        while start < len(lines) and len(text) < length:
            text, start = text + lines[start], start + 1
        if len(text) > 300:                                       # a long line: stop before a word
            text = text[:300].rsplit(" ", 1)[0]
        if len(text := text.rstrip()) >= 100:
            prompts.setdefault(text, name)
        if len(prompts) == count:
            break
    return [{"question_id": i, "turns": [text], "source": name} for i, (text, name) in enumerate(prompts.items())]


def read_prompts(path, limit=None):
    """The first `limit` prompts of a question.jsonl (ours, MT-bench, HumanEval, GSM8K): each a list of user turns."""
    lines = [line for line in (read_text(path) or "").split("\n") if line.strip()]
    prompts = [[text for role, text in read_turns(line, f"{path}, prompt {number}") if role == "user" and text]
               for number, line in enumerate(lines[:limit], 1)]
    if not all(prompts) or not prompts:
        raise UserError(f'{path} holds no prompts, or an empty one: expected {{"turns": ["text", ...]}} on every line')
    return prompts


def prepare(out, dataset="stdlib", inputs=None, vocab_size=None, tokenizer=None):
    """Write the data directory `out` and return its meta. dataset, inputs: see `collect`. vocab_size: ids of a BPE
    trained here, with the end-of-text token (default 2048; little text gives fewer); tokenizer: use this one."""
    vocab_size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
    if vocab_size < 257:
        raise UserError(f"--vocab-size {vocab_size}: at least 257, for the 256 bytes and the end-of-text token")
    encoding = load_encoding(tokenizer) if tokenizer is not None else None
    train, val = split(collect(dataset, inputs))
    out = make_room(out)
    if encoding is None:
        stride = 1 + sum(len(text) for _, text in train) // BPE_SAMPLE_CHARS
        ranks = train_bpe([text for _, text in train[::stride]], vocab_size - 1, LLAMA3_PATTERN)
        encoding = make_encoding("trained here", LLAMA3_PATTERN, ranks, {END_OF_TEXT: len(ranks)})

    meta = save_tokenizer(out / "tokenizer.model", encoding)
    meta |= {"dataset": "input" if inputs else dataset, "dtype": "uint16" if encoding.n_vocab < 65536 else "uint32"}
    for side, documents in ("train", train), ("val", val):
        tokens = encode(documents, encoding, meta)
        write_whole(out / f"{side}.bin", tokens.tofile)
        meta |= {f"{side}_documents": len(documents), f"{side}_tokens": len(tokens)}
    characters = sum(len(text) for _, text in train + val)
    meta["chars_per_token"] = round(characters / (meta["train_tokens"] + meta["val_tokens"]), 3)
    write_text(out / "prompts.jsonl", "".join(json.dumps(r) + "\n" for r in cut_prompts(val)))
    write_text(out / "meta.json", json.dumps(meta, indent=1))
    return meta


def make_room(out):
    """Create `out`, incomplete from here on; refuse a folder whose tokenizer.model or meta.json somebody else wrote."""
    out, ours = Path(out), read_own_meta(out) is not None
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from None
    for path in filter(Path.exists, (out / "meta.json", out / "tokenizer.model")):
        if not ours:
            raise UserError(f"{path} is not of a data directory, but a model's perhaps: choose another --out")
        path.unlink()
    return out


def encode(documents, encoding, meta):
    """All (name, text) documents as one array of meta["dtype"], an end-of-text token behind each."""
    parts = []
    for _, text in tqdm(documents, "encode", unit="doc", disable=None):
        ids = encoding.encode_ordinary_batch(pieces(text), num_threads=os.cpu_count() or 1)
        parts.append(np.array([token for piece in ids for token in piece] + [meta["eot_id"]], dtype=meta["dtype"]))
    return np.concatenate(parts)


def pieces(text):
    """`text` in parts of PIECE_CHARS characters at most, cut after a line where possible."""
    parts = []
    while len(text) > PIECE_CHARS:
        cut = text.rfind("\n", 0, PIECE_CHARS) + 1 or PIECE_CHARS
        parts.append(text[:cut])
        text = text[cut:]
    return [*parts, text]


class Corpus:
    """A prepared data directory: `meta` (dict), `encoding`, `prompts` (strings) and random training windows."""

    def __init__(self, directory):
        self.directory, meta = directory, read_own_meta(directory)
        try:
            self.vocab_size, self.eot_id = meta["vocab_size"], meta["eot_id"]
            self.tokens = {side: np.memmap(Path(directory, f"{side}.bin"), meta["dtype"], "r")
                           for side in ("train", "val")}          # [tokens]
            if any(len(tokens) != meta[f"{side}_tokens"] for side, tokens in self.tokens.items()):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{directory} holds no prepared data, or only a part: run python prepare_data.py --out"
                            f" {directory}, or name another directory") from None
        self.encoding = load_encoding(directory)

    def prompt_ids(self, limit=None):
        """The first PROMPT tokens of the held-out prompts, a list of ids each."""
        prompts = read_prompts(Path(self.directory, "prompts.jsonl"), limit)
        return [self.encoding.encode_ordinary(turns[0])[:PROMPT] for turns in prompts]

    def batch(self, side, step, batch_size, length, seed=0):
        """Windows of length+1 consecutive tokens: int64 [batch_size, length+1], inputs and targets overlapping.

        side is "train" or "val". A pure function of (seed, step): a resumed training sees the same batches."""
        tokens = self.tokens[side]
        if len(tokens) <= length:
            raise UserError(f"{self.directory}/{side}.bin has {len(tokens)} tokens, a window needs {length + 1}: "
                            "prepare more text or shorten the training length")
        starts = np.random.default_rng((seed, step)).integers(0, len(tokens) - length, batch_size)     # [B]
        return torch.from_numpy(tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64))


def ensure_data(directory, dataset, vocab_size):
    """Prepare a built-in dataset if `directory` does not exist or is empty; what is there must have this vocab_size."""
    if not os.path.isdir(directory) or not os.listdir(directory):
        prepare(directory, dataset, vocab_size=vocab_size)
    found = Corpus(directory).vocab_size
    if found != vocab_size:
        raise UserError(f"the vocabulary in {directory} has {found} ids, not {vocab_size}: leave --vocab-size out, or"
                        f" run python prepare_data.py --out {directory} --vocab-size {vocab_size}")
