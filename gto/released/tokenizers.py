"""Released models' tokenizers behind tiktoken's interface: Hugging Face's tokenizer.json, Llama 3's rank file, and
SentencePiece models (Llama 2, Vicuna), whose vocabulary is not made of bytes."""
import json
import re
import unicodedata
from pathlib import Path

import tiktoken

from gto.tokenizer import LLAMA3_PATTERN, make_encoding, read_ranks
from gto.util import UserError


def load(source, meta=None):
    """The encoding of a model's folder, or of a file tokenizer.json or tokenizer.model in it.

    meta: what prepare_data.py wrote beside a copy of such a tokenizer. UserError if it cannot be represented."""
    path = Path(source)
    if path.is_dir():
        path = path / ("tokenizer.json" if (path / "tokenizer.json").is_file() else "tokenizer.model")
    if not path.is_file():
        raise UserError(f"{source} has no tokenizer.model and no tokenizer.json")
    if path.suffix == ".json":
        return load_hugging_face(path)
    ranks = read_ranks(path)
    if ranks is None:
        return SentencePieceEncoding(path)
    if meta is not None:
        return make_encoding(str(path), meta["pattern"], ranks, meta["special_tokens"], KINDS[meta["normalizer"]])
    return make_encoding(str(path), LLAMA3_PATTERN, ranks, llama3_specials(len(ranks)))


def llama3_specials(first):
    """The 256 special tokens of Llama 3.1 at ids first..first+255."""
    named = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id",
             7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
    reserved = (f"reserved_special_token_{i}" for i in range(256))
    return {f"<|{named.get(i) or next(reserved)}|>": first + i for i in range(256)}


class NFCEncoding(tiktoken.Encoding):
    """Qwen's tokenizers compose characters (Unicode NFC) before they encode."""
    normalizer = "NFC"

    def encode(self, text, **options):
        return super().encode(unicodedata.normalize("NFC", text), **options)

    def encode_ordinary(self, text):
        return super().encode_ordinary(unicodedata.normalize("NFC", text))


KINDS = {None: tiktoken.Encoding, "NFC": NFCEncoding}              # by normalizer


def load_hugging_face(path):
    """A byte-level BPE tokenizer.json. Its strings spell each byte as one printable character (GPT-2's alphabet):
    printable bytes stand for themselves, the others, in order, are chr(256), chr(257), ..."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        split, byte_level = config["pre_tokenizer"]["pretokenizers"]
        if (split["type"], byte_level["type"], byte_level["use_regex"]) != ("Split", "ByteLevel", False):
            raise ValueError("it splits text in a way tiktoken cannot")
        kind = KINDS[config["normalizer"] and config["normalizer"]["type"]]
        specials = {token["content"]: token["id"] for token in config["added_tokens"]}
        ranks = {bytes(alphabet[char] for char in token): rank for token, rank in config["model"]["vocab"].items()
                 if token not in specials}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no byte-level BPE that tiktoken can represent ({type(error).__name__}: {error});"
                        f" if there is a SentencePiece model, give that, tokenizer.model") from None
    return make_encoding(str(path), split["pattern"]["Regex"], ranks, specials, kind)


class SentencePieceEncoding:
    """A SentencePiece model behind the methods of tiktoken.Encoding that this project uses."""

    def __init__(self, path):
        try:
            import sentencepiece
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (ImportError, RuntimeError, OSError) as error:
            raise UserError(f"{path} is no rank file; a SentencePiece model needs pip install sentencepiece ({error})"
                            ) from None
        self.name, self.n_vocab = str(path), self.model.get_piece_size()
        self.encode_ordinary = self.encode_ordinary_batch = self.model.encode
        self.decode = self.model.decode
        self._special_tokens = {self.model.id_to_piece(i): i for i in range(self.n_vocab) if self.model.is_control(i)}

    def encode(self, text, allowed_special="all"):
        """<s> and </s> in the text become their ids, which the library does not do; each stretch between two of them
        gets its own leading blank, as Hugging Face's first Llama tokenizers did."""
        ids = []
        for part in re.split("(" + "|".join(map(re.escape, self._special_tokens)) + ")", text):
            ids += [self._special_tokens[part]] if part in self._special_tokens else self.encode_ordinary(part)
        return ids

    def decode_single_token_bytes(self, token):
        """Unlike decode([token]), which drops the blank in front of a word. KeyError for an unknown id."""
        if not 0 <= token < self.n_vocab:
            raise KeyError(token)
        piece = self.model.id_to_piece(token)
        if self.model.is_byte(token):
            return bytes([int(piece[1:-1], 16)])                   # <0x0A>
        return b"" if self.model.is_control(token) else piece.replace("\u2581", " ").encode()

    def save(self, path):
        Path(path).write_bytes(self.model.serialized_model_proto())
