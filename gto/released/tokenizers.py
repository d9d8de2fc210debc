"""Released tokenizers, used like tiktoken's: tokenizer.json, GGUF's, SentencePiece (Llama 2, Vicuna)."""
from pathlib import Path

import tiktoken

from gto.released.files import locate, read_gguf, read_json
from gto.tokenizer import LLAMA3_PATTERN, Encoding, make_encoding
from gto.util import reading, write_whole

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's, for what is left between digits when each of them has been cut off: blanks in front of one are a whole piece.
SMOLLM_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"|\s+(?!\S)", r"|\s+(?=\p{N})|\s+(?!\S)")
GGUF_PATTERNS = {"llama-bpe": LLAMA3_PATTERN, "qwen2": LLAMA3_PATTERN.replace("{1,3}", ""), "smollm": SMOLLM_PATTERN,
                 "gpt-2": GPT2_PATTERN}                           # by tokenizer.ggml.pre
# GPT-2's spelling of a byte: printable ones stand for themselves, the others, in order, are chr(256), chr(257), ...
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = dict(zip(map(chr, [*PRINTABLE, *range(256, 324)]), [*PRINTABLE, *sorted({*range(256)} - {*PRINTABLE})]))


def load(source):
    """See `load_encoding`."""
    path = locate(source) or Path(source)
    if path.is_dir():
        path = path / ("tokenizer.json" if (path / "tokenizer.json").is_file() else "tokenizer.model")
    if not path.is_file():
        with reading(f"the tokenizer {source}, here or from the network,"):
            return tiktoken.get_encoding(str(source))
    return load_byte_level(path) if path.suffix in (".gguf", ".json") else SentencePieceEncoding(path)


def load_byte_level(path):
    """The byte-level BPE of a tokenizer.json or a GGUF file, which spell tokens in GPT-2's alphabet."""
    contents = read_gguf(path)[0] if path.suffix == ".gguf" else read_json(path)
    with reading(f"the tokenizer in {path} (--tokenizer names another, a tokenizer.model perhaps)"):
        if path.suffix == ".gguf":
            pre, tokens, kinds = (contents[f"tokenizer.ggml.{x}"] for x in ("pre", "tokens", "token_type"))
            vocab = {token: i for i, token in enumerate(tokens) if kinds[i] == 1}
            specials = {token: i for i, token in enumerate(tokens) if kinds[i] in (3, 4)}  # control, user defined
            pattern, normalizer = GGUF_PATTERNS[pre], "NFC" if pre == "qwen2" else None
        else:
            vocab = contents["model"]["vocab"]
            specials = {token["content"]: token["id"] for token in contents["added_tokens"]}
            pattern = split_pattern(contents["pre_tokenizer"])
            normalizer = contents["normalizer"] and contents["normalizer"]["type"]
        ranks = {bytes(ALPHABET[char] for char in token): i for token, i in vocab.items() if token not in specials}
        return make_encoding(str(path), pattern, ranks, specials, normalizer)


def split_pattern(pre_tokenizer):
    """The one pattern that splits as the pre_tokenizer of a tokenizer.json does. ValueError if none is known."""
    *before, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    match before, last["type"], last["add_prefix_space"], last.get("use_regex", True):
        case [{"type": "Split", "pattern": {"Regex": pattern}}], "ByteLevel", False, False:
            return pattern
        case [], "ByteLevel", False, True:
            return GPT2_PATTERN
        case [{"type": "Digits", "individual_digits": True}], "ByteLevel", False, True:
            return SMOLLM_PATTERN
    raise ValueError("it splits text in a way tiktoken cannot")


class SentencePieceEncoding:
    """A SentencePiece model behind the methods of tiktoken.Encoding that this project uses. What stands between two
    special tokens gets its own leading blank, as in Hugging Face's first Llama tokenizers."""
    encode = Encoding.encode

    def __init__(self, path):
        with reading(path):
            import sentencepiece
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.name, self.n_vocab = str(path), self.model.get_piece_size()
        self.encode_ordinary, self.decode = self.model.encode, self.model.decode
        self._special_tokens = {self.model.id_to_piece(i): i for i in range(self.n_vocab) if self.model.is_control(i)}

    def decode_single_token_bytes(self, token):
        """Unlike decode([token]), which drops the blank in front of a word. IndexError for an unknown id."""
        piece = self.model.id_to_piece(token)
        if self.model.is_byte(token):
            return bytes([int(piece[1:-1], 16)])                   # <0x0A>
        return b"" if self.model.is_control(token) else piece.replace("\u2581", " ").encode()

    def save(self, path):
        write_whole(path, self.model.serialized_model_proto())
