"""Tokenizers: ours, tiktoken's, and those of released models, behind one interface.

Everything encodes and decodes with tiktoken, except SentencePiece models (Llama 2, Vicuna), whose vocabulary is not
made of bytes; `SentencePieceEncoding` gives them the same few methods.
"""
import codecs
import json
import os
import re
import unicodedata

import tiktoken

from gto.bpe import read_ranks, save_ranks
from gto.errors import UserError

LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|end_of_text|>"
# How released tokenizers name the token between two documents.
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|endoftext|>", "<｜end▁of▁sentence｜>", "</s>")


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
        if read_own_meta(source) is not None:
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
    meta = read_own_meta(os.path.dirname(source))
    if meta is None:
        meta = {"pattern": LLAMA3_PATTERN, "special_tokens": llama3_specials(len(ranks)), "normalizer": None}
    return make_encoding(source, meta["pattern"], ranks, meta["special_tokens"], meta["normalizer"])


def describe(encoding):
    """The entries of meta.json that load_encoding needs beside tokenizer.model, and the sizes a model needs."""
    return {"vocab_size": encoding.n_vocab, "pattern": getattr(encoding, "_pat_str", None),
            "normalizer": "NFC" if isinstance(encoding, NFCEncoding) else None,
            "special_tokens": special_tokens(encoding), "eot_id": end_of_text_id(encoding)}


def save_tokenizer(path, encoding):
    """Write any encoding as tokenizer.model: a rank file, or the SentencePiece model it came from."""
    if not isinstance(encoding, SentencePieceEncoding):
        return save_ranks(path, encoding._mergeable_ranks)
    with open(f"{path}.tmp", "wb") as file:
        file.write(encoding.model.serialized_model_proto())
    os.replace(f"{path}.tmp", path)


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
        self.name = path
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
        for part in re.split("(" + "|".join(map(re.escape, self._special_tokens)) + ")", text):
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


def read_own_meta(directory):
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
    try:
        return kind(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    except ValueError as error:
        raise UserError(f"{name}: tiktoken does not understand the split pattern ({error})") from None


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
