"""Tokenizers: a byte-level BPE trained from scratch, tiktoken's rank files, and the text of tokens as they arrive.
A rank file, the format of Llama 3's `tokenizer.model`, has per line base64(bytes of the token), a space, the rank. The
rank is the token's id, and its priority: tiktoken merges the pair whose result has the lowest rank first."""
import base64
import codecs
import heapq
import json
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import regex
import tiktoken
from tqdm import tqdm

from gto.util import UserError, reading, write_whole

LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
END_OF_TEXT = "<|end_of_text|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|endoftext|>", "<｜end▁of▁sentence｜>", "</s>")     # in released tokenizers


class Encoding(tiktoken.Encoding):
    """Two things that tiktoken does not do: compose characters before (Unicode NFC, Qwen), and bear bytes without a
    token (SmolLM2), which vanish from the pieces that the pattern has cut, before these are merged."""

    def encode(self, text, allowed_special="all"):
        """Special tokens in the text become their ids, each stretch between two of them is encoded by itself."""
        specials, ids = self._special_tokens, []                  # private, but the documented way
        names = "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or "(?!)"          # (?!): nowhere
        for part in re.split(f"({names})", text):
            ids += [specials[part]] if part in specials else self.encode_ordinary(part)
        return ids

    def encode_ordinary(self, text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")      # as tiktoken mends surrogates
        text = unicodedata.normalize(self.normalizer, text) if self.normalizer else text
        if len(text.encode().translate(None, self.unknown)) == len(text.encode()):
            return super().encode_ordinary(text)
        pieces = (match[0].encode().translate(None, self.unknown) for match in regex.finditer(self._pat_str, text))
        return [token for piece in pieces if piece for token in self._encode_single_piece(piece)]


def make_encoding(name, pattern, ranks, specials, normalizer=None):
    """An encoding from its parts. ValueError if they contradict each other."""
    ids, single = [*ranks.values(), *specials.values()], [bytes([byte]) for byte in range(256)]
    if len(set(ids)) < len(ids) or not ranks.keys() >= set(single[32:127]):
        raise ValueError("not a byte-level vocabulary with a distinct id for each token")
    encoding = Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    unicodedata.normalize(normalizer or "NFC", "é")               # ValueError if there is no such form
    encoding.normalizer, encoding.unknown = normalizer, b"".join(byte for byte in single if byte not in ranks)
    return encoding


def read_own_meta(directory):
    """meta.json of prepare_data.py, or None; other programs write files of that name too."""
    if (path := Path(directory, "meta.json")).is_file():
        with reading(path):
            meta = json.loads(path.read_text(encoding="utf-8"))
            return meta if meta.keys() >= {"pattern", "special_tokens", "eot_id"} else None


def save_tokenizer(path, encoding):
    """Write any encoding as tokenizer.model, a rank file or in the format it came in. -> what meta.json says of it."""
    ranks = getattr(encoding, "_mergeable_ranks", {})
    save_ranks(path, ranks) if ranks else encoding.save(path)
    return {"vocab_size": encoding.n_vocab, "ranks": len(ranks), "pattern": getattr(encoding, "_pat_str", None),
            "normalizer": getattr(encoding, "normalizer", None), "special_tokens": encoding._special_tokens,
            "eot_id": end_of_text_id(encoding)}


def end_of_text_id(encoding):
    """The id that separates documents. UserError if the tokenizer has none of the usual ones."""
    if found := [encoding._special_tokens[name] for name in END_OF_TEXT_NAMES if name in encoding._special_tokens]:
        return found[0]
    raise UserError(f"the tokenizer {encoding.name} has no end-of-text token (one of {', '.join(END_OF_TEXT_NAMES)})")


class StreamDecoder:
    """Tokens in, text out: a character of several tokens is held back till complete, or till finish(), as U+FFFD."""

    def __init__(self, encoding):
        self.encoding, self.decoder = encoding, codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens):
        return self.decoder.decode(b"".join(token_bytes(self.encoding, token) for token in tokens))

    def finish(self):
        return self.decoder.decode(b"", final=True)


def token_bytes(encoding, token):
    """Bytes of one id; U+FFFD for an id the tokenizer lacks (models pad their vocabulary to a round size)."""
    try:
        return encoding.decode_single_token_bytes(token)
    except (KeyError, IndexError):
        return "\ufffd".encode()


def train_bpe(texts, vocab_size, pattern):
    """Learn a byte-level BPE of `vocab_size` tokens, or fewer if no pair is left that occurs twice. `pattern` cuts text
    into words, whose borders no token crosses. Returns {token bytes: rank}; ranks 0..255 are the single bytes. Pairs
    are counted by their joined bytes, which is what tiktoken looks up. Ties go to the smallest bytes."""
    frequency = Counter(word for text in texts for word in regex.findall(pattern, text))
    words = {word: [bytes([byte]) for byte in word.encode("utf-8", "replace")] for word in frequency}
    pair_count, pair_words = Counter(), defaultdict(set)          # joined bytes -> occurrences, words
    changed, heap, ranks = set(), [], {bytes([byte]): byte for byte in range(256)}

    def count(word, sign):
        for pair in map(bytes.__add__, words[word], words[word][1:]):
            pair_count[pair] += sign * frequency[word]
            pair_words[pair].add(word)
            changed.add(pair)

    for word in words:
        count(word, 1)
    with tqdm(total=vocab_size, initial=256, desc="train BPE", disable=None, unit="token") as bar:
        while len(ranks) < vocab_size:
            for pair in changed:
                heapq.heappush(heap, (-pair_count[pair], pair))
            changed.clear()
            occurrences, pair = heapq.heappop(heap) if heap else (0, b"")
            if -occurrences < 2:
                break
            if -occurrences != pair_count[pair]:
                continue                                          # outdated: the current count is in the heap too
            ranks.setdefault(pair, len(ranks))                    # b"abc" can return as a|bc after ab|c
            bar.update(len(ranks) - bar.n)
            for word in pair_words.pop(pair):
                count(word, -1)
                words[word] = merge_pair(words[word], pair)
                count(word, 1)
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
    write_whole(path, b"".join(lines))


def read_ranks(path):
    """The inverse of save_ranks, or None. (tiktoken's reader would return a file as it was when first read.)"""
    try:
        lines = [line.split() for line in Path(path).read_bytes().splitlines() if line]
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines} or None
    except (OSError, ValueError):
        return None
