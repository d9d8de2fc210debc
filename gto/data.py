"""From documents to batches: split them by file, encode them, and serve training windows.

A data directory holds
    train.bin, val.bin   token ids, flat; each document is followed by the end-of-text token
    tokenizer.model      how they were encoded (see gto/tokenizer.py)
    prompts.jsonl        prompts cut from validation documents, in the format of MT-bench's question.jsonl
    meta.json            sizes, dtype, split pattern; written last, so its presence says the directory is complete
"""
import hashlib
import json
import os
import random

import numpy as np
import torch
from tqdm import tqdm

from gto.bpe import train_bpe
from gto.corpus import collect
from gto.errors import UserError
from gto.tokenizer import (END_OF_TEXT, LLAMA3_PATTERN, describe, load_encoding, make_encoding, read_own_meta,
                           save_tokenizer)

DEFAULT_VOCAB_SIZE = 2048
BPE_SAMPLE_CHARS = 20_000_000       # more text does not change a small vocabulary, but costs time
PROMPT = 64                         # tokens of a held-out prompt, at most
PIECE_CHARS = 100_000               # longest text given to tiktoken at once: its regex can exhaust the stack


# Split and prompts ------------------------------------------------------------------------------------------------

def split(documents, val_fraction):
    """(train, validation) documents, by a hash of the name: the same file falls on the same side in every dataset.
    A handful of documents cannot be divided so; then the last part of each is for validation."""
    is_val = [int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < val_fraction * 2**32 for name, _ in documents]
    if len(documents) >= 20 and 0 < sum(is_val) < len(documents):
        return ([document for document, val in zip(documents, is_val) if not val],
                [document for document, val in zip(documents, is_val) if val])
    train, val = [], []
    for name, text in documents:
        cut = text.rfind("\n", 0, int(len(text) * (1 - val_fraction))) + 1 or int(len(text) * (1 - val_fraction))
        train.append((name, text[:cut]))
        val.append((name, text[cut:]))
    return train, val


def cut_prompts(documents, count=128, seed=0):
    """Prompts of 100 to 300 characters from (name, text) documents, taking turns among them: whole lines, every
    second one from a def or class where there is one. Returns records of prompts.jsonl; fewer if text is short."""
    rng = random.Random(seed)
    documents = [(name, text.splitlines(keepends=True)) for name, text in documents if len(text) >= 100]
    rng.shuffle(documents)
    records, seen = [], set()
    for attempt in range(10 * count if documents else 0):
        name, lines = documents[attempt % len(documents)]
        starts = [i for i, line in enumerate(lines) if line.strip()]
        heads = [i for i in starts if lines[i].lstrip().startswith(("def ", "class "))]
        start = rng.choice(heads if heads and rng.random() < .5 else starts)
        length, text = rng.randint(100, 240), ""
        while start < len(lines) and len(text) < length:
            text, start = text + lines[start], start + 1
        if len(text) > 300:                                       # a long line: stop before a word
            text = text[:text.rfind(" ", 100, 300)] if " " in text[100:300] else text[:300]
        text = text.rstrip()
        if len(text) >= 100 and text not in seen:
            seen.add(text)
            kind = text.split(maxsplit=1)[0]
            category = kind if kind in ("def", "class") else "text"
            records.append({"question_id": len(records), "category": category, "turns": [text], "source": name})
            if len(records) == count:
                break
    return records


def read_prompts(path, limit=None):
    """The first `limit` prompts of a question.jsonl (ours, MT-bench, HumanEval, GSM8K): each a list of user turns."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts {path}: {error}") from None
    prompts = []
    for number, line in enumerate(lines[:limit], 1):
        try:
            turns = json.loads(line)["turns"]
        except (ValueError, KeyError, TypeError):
            turns = None
        if not (isinstance(turns, list) and turns and all(isinstance(turn, str) and turn for turn in turns)):
            raise UserError(f'{path}, prompt {number}: expected {{"turns": ["text", ...]}} on one line')
        prompts.append(turns)
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts


# Preparation ------------------------------------------------------------------------------------------------------

def prepare(out, dataset="stdlib", inputs=None, vocab_size=None, tokenizer=None, val_fraction=.05):
    """Write the data directory `out` and return its meta.

    dataset, inputs   see gto.corpus.collect
    vocab_size        ids of a BPE trained here, with the end-of-text token (default 2048); small corpora give fewer
    tokenizer         use this one instead (see load_encoding)
    """
    if tokenizer is not None and vocab_size is not None:
        raise UserError("--vocab-size is for a tokenizer trained here: leave it out, or leave --tokenizer out")
    vocab_size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
    if vocab_size < 257:
        raise UserError(f"--vocab-size {vocab_size}: at least 257, for the 256 bytes and the end-of-text token")
    if not 0 < val_fraction <= .5:
        raise UserError(f"--val-fraction {val_fraction}: more than 0 and at most 0.5")
    make_room(out)
    encoding = load_encoding(tokenizer) if tokenizer is not None else None
    train, val = split(collect(dataset, inputs, download_dir=out), val_fraction)
    if encoding is None:
        stride = 1 + sum(len(text) for _, text in train) // BPE_SAMPLE_CHARS
        ranks = train_bpe([text for _, text in train[::stride]], vocab_size - 1, LLAMA3_PATTERN)
        encoding = make_encoding("trained here", LLAMA3_PATTERN, ranks, {END_OF_TEXT: len(ranks)})

    meta = describe(encoding)
    for name in "meta.json", "tokenizer.model":                   # from here till the end the directory is incomplete
        if os.path.exists(path := os.path.join(out, name)):
            os.remove(path)
    meta |= {"dataset": "input" if inputs else dataset, "dtype": "uint16" if encoding.n_vocab < 65536 else "uint32"}
    for side, documents in ("train", train), ("val", val):
        meta[f"{side}_documents"] = len(documents)
        meta[f"{side}_tokens"] = write_tokens(os.path.join(out, f"{side}.bin"), documents, encoding, meta)
    characters = sum(len(text) for _, text in train + val)
    meta["chars_per_token"] = round(characters / (meta["train_tokens"] + meta["val_tokens"]), 3)
    write_text(os.path.join(out, "prompts.jsonl"), "".join(json.dumps(r) + "\n" for r in cut_prompts(val)))
    save_tokenizer(os.path.join(out, "tokenizer.model"), encoding)
    write_text(os.path.join(out, "meta.json"), json.dumps(meta, indent=1))
    return meta


def make_room(out):
    """Create `out`; refuse a folder whose tokenizer.model or meta.json somebody else wrote, such as a model's."""
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from None
    if read_own_meta(out) is None:
        for name in "meta.json", "tokenizer.model":
            if os.path.exists(os.path.join(out, name)):
                raise UserError(f"{out} holds a {name} that is not of a data directory: choose another --out")


def write_tokens(path, documents, encoding, meta):
    """Encode (name, text) documents into a flat file of meta["dtype"]. Returns the number of tokens."""
    count = 0
    with open(f"{path}.tmp", "wb") as file, tqdm(total=len(documents), desc=f"encode {os.path.basename(path)}",
                                                 unit="doc", disable=None) as bar:
        for start in range(0, len(documents), 64):
            batch = [pieces(text) for _, text in documents[start:start + 64]]
            ids = iter(encoding.encode_ordinary_batch([piece for parts in batch for piece in parts],
                                                      num_threads=os.cpu_count() or 1))
            for parts in batch:
                tokens = [token for _ in parts for token in next(ids)] + [meta["eot_id"]]
                np.array(tokens, dtype=meta["dtype"]).tofile(file)
                count += len(tokens)
            bar.update(len(batch))
    os.replace(f"{path}.tmp", path)
    return count


def pieces(text):
    """`text` in parts of PIECE_CHARS characters at most, cut after a line where possible."""
    parts = []
    while len(text) > PIECE_CHARS:
        cut = text.rfind("\n", 0, PIECE_CHARS) + 1 or PIECE_CHARS
        parts.append(text[:cut])
        text = text[cut:]
    return [*parts, text]


def write_text(path, text):
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}.tmp", path)


# Batches ----------------------------------------------------------------------------------------------------------

class Corpus:
    """A prepared data directory: `meta` (dict), `encoding`, `prompts` (strings) and random training windows."""

    def __init__(self, directory):
        try:
            with open(os.path.join(directory, "meta.json"), encoding="utf-8") as file:
                self.meta = json.load(file)
            self.vocab_size, self.eot_id = self.meta["vocab_size"], self.meta["eot_id"]
            sizes = {side: self.meta[f"{side}_tokens"] for side in ("train", "val")}
            self.tokens = {side: np.memmap(os.path.join(directory, f"{side}.bin"), self.meta["dtype"], "r")
                           for side in sizes}                     # [tokens]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{directory} holds no prepared data: run python prepare_data.py --out {directory}, "
                            "or name another directory") from None
        for side, size in sizes.items():
            if len(self.tokens[side]) != size:
                raise UserError(f"{directory}/{side}.bin has {len(self.tokens[side])} tokens, meta.json says {size}: "
                                f"run python prepare_data.py --out {directory} again")
        self.directory = directory
        self.encoding = load_encoding(directory)

    def prompts(self, limit=None):
        """Held-out prompts, a string each."""
        return [turns[0] for turns in read_prompts(os.path.join(self.directory, "prompts.jsonl"), limit)]

    def prompt_ids(self, limit=None):
        """Their first PROMPT tokens, a list of ids each."""
        return [self.encoding.encode_ordinary(prompt)[:PROMPT] for prompt in self.prompts(limit)]

    def batch(self, side, step, batch_size, length, seed=0):
        """Windows of length+1 consecutive tokens: int64 [batch_size, length+1], inputs and targets overlapping.

        side is "train" or "val". A pure function of (seed, step): a resumed training sees the same batches."""
        tokens = self.tokens[side]
        if len(tokens) <= length:
            raise UserError(f"{self.directory}/{side}.bin has {len(tokens)} tokens, a window needs {length + 1}: "
                            "prepare more text or shorten the training length")
        starts = np.random.default_rng((seed, step)).integers(0, len(tokens) - length, batch_size)     # [B]
        return torch.from_numpy(tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64))


def ensure_data(directory, dataset="stdlib", vocab_size=None):
    """The Corpus in `directory`, which is prepared first if it does not exist or is empty.

    What is there already is taken as it is. UserError if that is no (complete) data, or if vocab_size is given and
    the vocabulary has another size."""
    if not os.path.isdir(directory) or set(os.listdir(directory)) <= {"shakespeare.txt"}:
        prepare(directory, dataset, vocab_size=vocab_size)
    corpus = Corpus(directory)
    if vocab_size not in (None, corpus.vocab_size):
        raise UserError(f"the vocabulary in {directory} has {corpus.vocab_size} ids, not {vocab_size}: leave "
                        f"--vocab-size out or run python prepare_data.py --out {directory} --vocab-size {vocab_size}")
    return corpus
