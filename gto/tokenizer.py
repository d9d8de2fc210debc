"""Tokenizers: a byte-level BPE trainer, tiktoken's rank files, and the tokenizers of released models.

Everything encodes and decodes with tiktoken, except SentencePiece models (Llama 2, Vicuna), whose vocabulary is not
made of bytes; `SentencePieceEncoding` gives them the same few methods.

A rank file is text: per line base64(bytes of the token), a space, the rank. It is the format of Llama 3's
`tokenizer.model`. A token's rank is its id, and also its priority: tiktoken merges the pair whose result has the
lowest rank first.
"""
import base64
import binascii
import codecs
import heapq
import json
import os
import shutil
import unicodedata
from collections import Counter, defaultdict

import regex
import tiktoken
from tqdm import tqdm

from gto.errors import UserError

LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|end_of_text|>"
# How released tokenizers name the token between two documents.
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|endoftext|>", "<｜end▁of▁sentence｜>", "</s>")


# Training -------------------------------------------------------------------------------------------------------

def train_bpe(texts, vocab_size, pattern=LLAMA3_PATTERN, progress=True):
    """Learn a byte-level BPE. texts: iterable of str. Returns {token bytes: rank} with vocab_size entries, or fewer
    if no pair is left that occurs twice; ranks 0..255 are the single bytes.

    Candidates are counted by the bytes they would make, not by their two halves: tiktoken merges *any* neighbours
    whose joined bytes are in the table, and so trainer and encoder cut the training text alike. Ties go to the
    smallest bytes, so the result depends on nothing but the words' counts.
    """
    counts = Counter()
    for text in tqdm(texts, "count words", disable=None if progress else True, unit="doc", leave=False):
        counts.update(regex.findall(pattern, text))
    words = [[bytes([byte]) for byte in word.encode("utf-8", "replace")] for word in counts]
    frequency = list(counts.values())

    pair_count, pair_words = Counter(), defaultdict(set)          # joined bytes -> occurrences, indices of words
    for index, word in enumerate(words):
        for left, right in zip(word, word[1:]):
            pair_count[left + right] += frequency[index]
            pair_words[left + right].add(index)
    heap = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(heap)

    ranks = {bytes([byte]): byte for byte in range(256)}
    with tqdm(total=vocab_size, initial=256, desc="train BPE", disable=None if progress else True, unit="token") as bar:
        while len(ranks) < vocab_size and heap:
            count, pair = heapq.heappop(heap)
            if -count != pair_count[pair]:
                continue                                          # outdated: a newer entry is in the heap
            if -count < 2:
                break
            if pair not in ranks:                                 # b"abc" can return as a|bc after ab|c
                ranks[pair] = len(ranks)
                bar.update()
            changed = set()
            for index in pair_words.pop(pair):
                old, words[index] = words[index], merge_pair(words[index], pair)
                for left, right in zip(old, old[1:]):
                    pair_count[left + right] -= frequency[index]
                    changed.add(left + right)
                for left, right in zip(words[index], words[index][1:]):
                    pair_count[left + right] += frequency[index]
                    pair_words[left + right].add(index)
                    changed.add(left + right)
            for key in changed:
                if pair_count[key] > 0:
                    heapq.heappush(heap, (-pair_count[key], key))
    return ranks


def merge_pair(word, pair):
    """word: list of bytes. Joins neighbours that make `pair`, from left to right."""
    merged, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and word[i] + word[i + 1] == pair:
            merged.append(pair)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


# Rank files -----------------------------------------------------------------------------------------------------

def save_ranks(path, ranks):
    """Write {token bytes: rank} as a tiktoken rank file."""
    with open(f"{path}.tmp", "wb") as file:
        for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
            file.write(base64.b64encode(token) + b" %d\n" % rank)
    os.replace(f"{path}.tmp", path)


def read_ranks(path):
    """The inverse of save_ranks, or None if the file is something else (a SentencePiece model).

    Not tiktoken.load.load_tiktoken_bpe: that one caches by *path*, so a tokenizer trained again into the same file
    would come back as the old one.
    """
    ranks = {}
    with open(path, "rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                return None
    return ranks or None


# Loading --------------------------------------------------------------------------------------------------------

def load_encoding(source):
    """The tokenizer of a data directory, of a released model, or one of tiktoken's by name.

    source   a directory that prepare_data.py wrote (tokenizer.model + meta.json), or a model's folder; a file
             tokenizer.json (Hugging Face, byte-level BPE) or tokenizer.model (Llama 3's rank file, SentencePiece);
             or a name such as "gpt2", which tiktoken downloads once
    Returns a tiktoken.Encoding or a SentencePieceEncoding. Encode text a user wrote with `encode_ordinary`, which
    reads special tokens as plain text, and a rendered chat template with `encode(text, allowed_special="all")`.
    Neither adds a beginning-of-text token. UserError if there is no such tokenizer or it cannot be represented.
    """
    source = str(source)
    if os.path.isdir(source):
        names = ["tokenizer.json", "tokenizer.model"]
        if _read_own_meta(source) is not None:
            names.reverse()
        path = next((p for p in (os.path.join(source, name) for name in names) if os.path.isfile(p)), None)
        if path is None:
            raise UserError(f"{source} has no tokenizer.model and no tokenizer.json")
        return load_encoding(path)
    if not os.path.isfile(source):
        return _load_by_name(source)
    if source.endswith(".json"):
        return _load_hugging_face(source)
    ranks = read_ranks(source)
    if ranks is None:
        return SentencePieceEncoding(source)
    meta = _read_own_meta(os.path.dirname(source))
    if meta is None:
        meta = {"pattern": LLAMA3_PATTERN, "special_tokens": llama3_specials(len(ranks)), "normalizer": None}
    return make_encoding(source, meta["pattern"], ranks, meta["special_tokens"], meta["normalizer"])


def save_encoding(directory, encoding):
    """Write tokenizer.model there. Returns the entries of meta.json that load_encoding(directory) needs beside it."""
    path = os.path.join(directory, "tokenizer.model")
    if isinstance(encoding, SentencePieceEncoding):
        shutil.copyfile(encoding.path, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    else:
        save_ranks(path, encoding._mergeable_ranks)
    return {"vocab_size": encoding.n_vocab, "pattern": getattr(encoding, "_pat_str", None),
            "normalizer": "NFC" if isinstance(encoding, NFCEncoding) else None,
            "special_tokens": special_tokens(encoding), "eot_id": end_of_text_id(encoding)}


def special_tokens(encoding):
    """{string: id}; tiktoken keeps it in a private field, as it documents for building one encoding from another."""
    return dict(encoding._special_tokens)


def end_of_text_id(encoding):
    """The id that separates documents. UserError if the tokenizer has none of the usual ones."""
    specials = special_tokens(encoding)
    for name in END_OF_TEXT_NAMES:
        if name in specials:
            return specials[name]
    raise UserError(f"the tokenizer {encoding.name} has no end-of-text token (one of {', '.join(END_OF_TEXT_NAMES)})")


def token_bytes(encoding, token):
    """Bytes of one id; U+FFFD for an id the tokenizer lacks (models pad their vocabulary to a round size)."""
    try:
        return encoding.decode_single_token_bytes(token)
    except KeyError:
        return "\ufffd".encode()


class StreamDecoder:
    """Tokens in, text out, while they arrive: a character whose bytes span several tokens is held back till complete.

    push(tokens) returns the new text; finish() returns what was held back, as U+FFFD."""

    def __init__(self, encoding):
        self.encoding = encoding
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens):
        return self.decoder.decode(b"".join(token_bytes(self.encoding, token) for token in tokens))

    def finish(self):
        return self.decoder.decode(b"", final=True)


def llama3_specials(first):
    """The 256 special tokens of Llama 3.1 at ids first..first+255."""
    named = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id",
             7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
    reserved = (f"reserved_special_token_{i}" for i in range(256))
    return {f"<|{named.get(i) or next(reserved)}|>": first + i for i in range(256)}


class NFCEncoding(tiktoken.Encoding):
    """Qwen's tokenizers compose characters (Unicode NFC) before they encode."""

    def encode(self, text, **options):
        return super().encode(unicodedata.normalize("NFC", text), **options)

    def encode_ordinary(self, text):
        return super().encode_ordinary(unicodedata.normalize("NFC", text))


class SentencePieceEncoding:
    """A SentencePiece model (Llama 2, Vicuna) behind the methods of tiktoken.Encoding that this project uses."""

    def __init__(self, path):
        try:
            import sentencepiece
        except ImportError:
            raise UserError(f"{path} is no rank file; if it is a SentencePiece model: pip install sentencepiece")
        self.name, self.path = path, path
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError):
            raise UserError(f"{path} is neither a tiktoken rank file nor a SentencePiece model") from None
        self.n_vocab = self.model.get_piece_size()
        self._special_tokens = {self.model.id_to_piece(i): i for i in range(self.n_vocab) if self.model.is_control(i)}

    def encode_ordinary(self, text):
        return self.model.encode(text)

    def encode_ordinary_batch(self, texts, num_threads=1):
        return self.model.encode(texts, num_threads=num_threads)

    def encode(self, text, allowed_special=()):
        """allowed_special="all": <s> and </s> in the text become their ids. The library does not recognise them;
        each stretch between two of them gets its own leading blank, as Hugging Face's first Llama tokenizers did."""
        if allowed_special != "all":
            return self.encode_ordinary(text)
        ids = []
        for part in regex.split("(" + "|".join(map(regex.escape, self._special_tokens)) + ")", text):
            ids += [self._special_tokens[part]] if part in self._special_tokens else self.encode_ordinary(part)
        return ids

    def decode(self, tokens):
        return self.model.decode(list(tokens))

    def decode_single_token_bytes(self, token):
        """Unlike decode([token]), which drops the blank in front of a word. KeyError for an unknown id."""
        if not 0 <= token < self.n_vocab:
            raise KeyError(token)
        piece = self.model.id_to_piece(token)
        if self.model.is_byte(token):
            return bytes([int(piece[1:-1], 16)])                  # <0x0A>
        return b"" if self.model.is_control(token) else piece.replace("\u2581", " ").encode()


def _read_own_meta(directory):
    """meta.json of prepare_data.py, or None; other programs write files of that name too."""
    try:
        with open(os.path.join(directory, "meta.json"), encoding="utf-8") as file:
            meta = json.load(file)
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) and {"pattern", "special_tokens", "eot_id"} <= meta.keys() else None


def make_encoding(name, pattern, ranks, specials, normalizer=None):
    """A tiktoken.Encoding from its parts. UserError if they contradict each other."""
    ids = [*ranks.values(), *specials.values()]
    if len(set(ids)) < len(ids) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise UserError(f"{name}: not a byte-level vocabulary with all 256 bytes and a distinct id for each token")
    kind = {None: tiktoken.Encoding, "NFC": NFCEncoding}[normalizer]
    return kind(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)


def _load_by_name(name):
    if name not in tiktoken.list_encoding_names():
        raise UserError(f"no tokenizer {name}: not a file, not a directory, and tiktoken knows only "
                        f"{', '.join(tiktoken.list_encoding_names())}")
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:                                      # requests' errors are OSErrors
        raise UserError(f"tiktoken must download {name} once and could not ({type(error).__name__}): connect to the "
                        f"network, or train a tokenizer (leave --tokenizer out)") from None


def _load_hugging_face(path):
    """A byte-level BPE tokenizer.json. Its strings spell each byte as one printable character (GPT-2's alphabet)."""
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
        model, added = config["model"], {token["content"]: token["id"] for token in config["added_tokens"] or []}
        if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
            raise UserError(f"{path} is no byte-level BPE; for a SentencePiece model give its tokenizer.model")
        pattern, normalizer = _split_pattern(path, config["pre_tokenizer"]), _normalizer(path, config["normalizer"])
        alphabet = _byte_alphabet()
        ranks = {bytes(alphabet[char] for char in token): rank for token, rank in model["vocab"].items()
                 if token not in added}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no byte-level BPE tokenizer.json ({type(error).__name__}: {error})") from None
    return make_encoding(path, pattern, ranks, added, normalizer)


def _split_pattern(path, pre_tokenizer):
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0]["add_prefix_space"]:
        return GPT2_PATTERN
    if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"] and not steps[1]["add_prefix_space"]:
        return steps[0]["pattern"]["Regex"]
    raise UserError(f"{path} splits text in a way tiktoken cannot (pre_tokenizer {' + '.join(kinds)})")


def _normalizer(path, normalizer):
    if normalizer is None or normalizer["type"] == "NFC":
        return normalizer and "NFC"
    raise UserError(f"{path} normalises text with {normalizer['type']}; only NFC is supported")


def _byte_alphabet():
    """{character: byte}: printable bytes stand for themselves, the others, in order, are chr(256), chr(257), ..."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
