"""Byte-level BPE from scratch, and tiktoken's rank-file format.

A rank file is text: per line base64(bytes of the token), a space, the rank. It is the format of Llama 3's
`tokenizer.model`. A token's rank is its id, and also its priority: tiktoken merges the pair whose result has the
lowest rank first.
"""
import base64
import binascii
import heapq
import os
from collections import Counter, defaultdict

import regex
from tqdm import tqdm


def train_bpe(texts, vocab_size, pattern, progress=True):
    """Learn a byte-level BPE. Returns {token bytes: rank}; ranks 0..255 are the single bytes.

    texts        iterable of str
    vocab_size   entries to return; fewer if no pair is left that occurs twice
    pattern      regular expression that cuts text into words; no token crosses their borders
    progress     show bars (on a terminal)

    Candidates are counted by the bytes they would make, not by their two halves, because tiktoken merges any
    neighbours whose joined bytes are in the table. Ties go to the smallest bytes, so the result depends on nothing
    but the words' counts. A merge touches only the words that hold the pair; `heap` may hold outdated counts.
    """
    quiet = None if progress else True                            # tqdm: None means quiet unless a terminal
    counts = Counter()
    for text in tqdm(texts, "count words", disable=quiet, unit="doc", leave=False):
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
    with tqdm(total=vocab_size, initial=256, desc="train BPE", disable=quiet, unit="token") as bar:
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
