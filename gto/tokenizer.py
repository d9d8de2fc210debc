"""Tokenizers: a byte-level BPE trained from scratch, tiktoken's rank files, and the text of tokens as they arrive.

A rank file, the format of Llama 3's `tokenizer.model`, has per line base64(bytes of the token), a space, the rank. The
rank is the token's id, and its priority: tiktoken merges the pair whose result has the lowest rank first.
"""
import base64
import binascii
import codecs
import heapq
import json
from collections import Counter, defaultdict
from pathlib import Path

import regex
import tiktoken
from tqdm import tqdm

from gto.util import UserError, write_whole

LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
END_OF_TEXT = "<|end_of_text|>"
# How released tokenizers name the token between two documents.
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|endoftext|>", "<｜end▁of▁sentence｜>", "</s>")


def make_encoding(name, pattern, ranks, specials, kind=tiktoken.Encoding):
    """An encoding from its parts; kind: tiktoken.Encoding or a subclass. UserError if they contradict each other."""
    ids = [*ranks.values(), *specials.values()]
    if len(set(ids)) < len(ids) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise UserError(f"{name}: not a byte-level vocabulary with all 256 bytes and a distinct id for each token")
    try:
        return kind(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    except ValueError as error:
        raise UserError(f"{name}: tiktoken does not understand the split pattern ({error})") from None


def read_own_meta(directory):
    """meta.json of prepare_data.py, or None; other programs write files of that name too."""
    try:
        meta = json.loads(Path(directory, "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) and {"pattern", "special_tokens", "eot_id"} <= meta.keys() else None


def save_tokenizer(path, encoding):
    """Write any encoding as tokenizer.model, a rank file or in the format it came in. -> what meta.json says of it."""
    save = getattr(encoding, "save", None)
    save(path) if save else save_ranks(path, encoding._mergeable_ranks)
    return {"vocab_size": encoding.n_vocab, "pattern": getattr(encoding, "_pat_str", None),
            "normalizer": getattr(encoding, "normalizer", None),
            "special_tokens": encoding._special_tokens, "eot_id": end_of_text_id(encoding)}


def end_of_text_id(encoding):
    """The id that separates documents. UserError if the tokenizer has none of the usual ones."""
    for name in END_OF_TEXT_NAMES:
        if name in encoding._special_tokens:                      # private, but the documented way
            return encoding._special_tokens[name]
    raise UserError(f"the tokenizer {encoding.name} has no end-of-text token (one of {', '.join(END_OF_TEXT_NAMES)})")


class StreamDecoder:
    """Tokens in, text out, while they arrive: a character whose bytes span several tokens is held back till complete,
    or till finish() returns it as U+FFFD."""

    def __init__(self, encoding):
        self.encoding = encoding
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens):
        return self.decoder.decode(b"".join(token_bytes(self.encoding, token) for token in tokens))

    def finish(self):
        return self.decoder.decode(b"", final=True)


def token_bytes(encoding, token):
    """Bytes of one id; U+FFFD for an id the tokenizer lacks (models pad their vocabulary to a round size)."""
    try:
        return encoding.decode_single_token_bytes(token)
    except KeyError:
        return "\ufffd".encode()


def train_bpe(texts, vocab_size, pattern):
    """Learn a byte-level BPE of `vocab_size` tokens, or fewer if no pair is left that occurs twice. `pattern` cuts text
    into words, whose borders no token crosses. Returns {token bytes: rank}; ranks 0..255 are the single bytes.

    Candidates are counted by the bytes they would make, not by their two halves: tiktoken merges any neighbours whose
    joined bytes are in the table. Ties go to the smallest bytes. A merge touches only the words that hold the pair."""
    counts = Counter(word for text in texts for word in regex.findall(pattern, text))
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
    with tqdm(total=vocab_size, initial=256, desc="train BPE", disable=None, unit="token") as bar:
        while len(ranks) < vocab_size and heap:
            count, pair = heapq.heappop(heap)
            if -count != pair_count[pair]:
                continue                                          # outdated: the current count is in the heap too
            if -count < 2:
                break
            if pair not in ranks:                                 # b"abc" can return as a|bc after ab|c
                ranks[pair] = len(ranks)
                bar.update()
            changed = set()
            for index in pair_words.pop(pair):
                old, words[index] = words[index], merge_pair(words[index], pair)
                for word, sign in (old, -1), (words[index], 1):
                    for left, right in zip(word, word[1:]):
                        pair_count[left + right] += sign * frequency[index]
                        if sign > 0:
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
        step = 2 if i + 1 < len(word) and word[i] + word[i + 1] == pair else 1
        merged.append(b"".join(word[i:i + step]))
        i += step
    return merged


def save_ranks(path, ranks):
    """Write {token bytes: rank} as a tiktoken rank file."""
    lines = [base64.b64encode(token) + b" %d\n" % ranks[token] for token in sorted(ranks, key=ranks.get)]
    write_whole(path, lambda temporary: temporary.write_bytes(b"".join(lines)))


def read_ranks(path):
    """The inverse of save_ranks, or None if the file is something else. (tiktoken's own reader caches by *path*: a
    tokenizer trained again into the same file would come back as the old one.)"""
    ranks = {}
    with open(path, "rb") as file:
        for line in filter(None, map(bytes.strip, file)):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                return None
    return ranks or None
