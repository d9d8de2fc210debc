"""Chat templates of the supported targets, and conversations as training texts.

Templates contain their beginning-of-text token. As in Hugging Face's tokenizers, a special token that somebody typed
into a message counts as one.
"""
from typing import NamedTuple

import torch
from tqdm import tqdm

from gto.data import read_text, read_turns
from gto.released.tokenizers import SentencePieceEncoding
from gto.util import UserError, rank


class Template(NamedTuple):
    """How a family of models writes a conversation; {} stands for the text of a message."""
    sign: str                   # a special token that only this family's tokenizers have
    stops: list                 # what ends an answer
    begin: str                  # the system message
    question: str               # of the user, up to where the answer begins
    answer: str                 # what the model writes, its end token included
    system: str | None = ""     # the message if nobody sets one; None: then `begin` is left out
    thought: str = ""           # what the last answer is made to begin with; answers before it lose their thoughts
    own_thought: bool = False   # the last answer, once it is there, has its own


TEMPLATES = {
    "deepseek-r1": Template(    # a distilled Llama's tokenizer may keep Llama 3's tokens: this sign is looked for first
        "<｜User｜>", ["<｜end▁of▁sentence｜>"],
        "<｜begin▁of▁sentence｜>{}", "<｜User｜>{}<｜Assistant｜>", "{}<｜end▁of▁sentence｜>",
        thought="<think>\n", own_thought=True),
    "llama3": Template(         # Instruct; the released template has the dates even if nobody sets a system message
        "<|start_header_id|>", ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"],
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{}<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "{}<|eot_id|>"),
    "qwen3": Template(          # thinking is off: an empty thought. A question's first newline ends what is before
        "<|im_start|>", ["<|im_end|>", "<|endoftext|>"],
        "<|im_start|>system\n{}<|im_end|>", "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "{}<|im_end|>",
        system=None, thought="<think>\n\n</think>\n\n"),
    "vicuna": Template(
        "</s>", ["</s>"],
        "<s>{} ", "USER: {} ASSISTANT:", " {}</s>",
        system="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
               "detailed, and polite answers to the user's questions."),
}


def guess_template(encoding):
    """The template's name, by the tokenizer's special tokens. UserError if none fits: it is no chat model we know."""
    for name, template in TEMPLATES.items():
        if template.sign in encoding._special_tokens:
            return name
    raise UserError(f"the tokenizer {encoding.name} is of no chat model known here ({', '.join(TEMPLATES)})")


def stop_ids(template, encoding):
    """Ids that end an answer, for Engine.generate(stop=...)."""
    specials = encoding._special_tokens
    return {specials[token] for token in TEMPLATES[template].stops if token in specials}


def turns(template, messages):
    """A conversation as [(text, written)], for encoding.encode(text, allowed_special="all"); `written` marks what the
    model itself writes, where training takes its loss. After a message of the user it ends where the answer begins.

    messages: [{"role", "content"}], an optional system message, then user and assistant in turns, the user first."""
    form, messages = TEMPLATES[template], [(message["role"], message["content"].strip()) for message in messages]
    system = (messages.pop(0)[1] if messages[0][0] == "system" else "") or form.system
    begin = "" if system is None else form.begin.format(system)
    turns = []
    for i, (role, text) in enumerate(messages):
        later = len(messages) - 1 - i                              # messages after this one
        if role == "user":
            thought = form.thought if later == 0 or later == 1 and not form.own_thought else ""
            question = form.question.format(text) + thought
            turns.append((question if turns else (begin + question).lstrip("\n"), False))
        else:
            if form.thought and not (form.own_thought and later == 0):
                text = text.split("</think>")[-1].strip()
            turns.append((form.answer.format(text), True))
    return turns


def encode(template, messages, encoding):
    """The ids of a conversation, and for each whether the model wrote it: two lists of equal length."""
    ids, written = [], []
    for text, by_model in turns(template, messages):
        if isinstance(encoding, SentencePieceEncoding):
            text = text.removeprefix(" ")                          # SentencePiece puts a blank in front of every piece
        part = encoding.encode(text, allowed_special="all")
        ids += part
        written += [by_model] * len(part)
    return ids, written


def in_order(turns):
    """[(role, text)] as `read_turns` has them -> messages that `encode` takes. An answer that stands first is dropped
    (ShareGPT's parts of longer talks); at a turn out of order, or empty, the rest of the conversation is."""
    turns = [(role, text.strip()) for role, text in turns]
    messages = [turns.pop(0)] if turns and turns[0][0] == "system" else []
    if turns and turns[0][0] == "assistant":
        turns.pop(0)
    for i, (role, text) in enumerate(turns):
        if role != ("user", "assistant")[i % 2] or not text:
            break
        messages.append((role, text))
    return [{"role": role, "content": text} for role, text in messages]


def encode_conversations(path, encoding, length, room):
    """The conversations of a chat .jsonl (see `read_turns`), cut to `length` tokens and padded on the right, with
    `room` to spare: {"tokens" [n, length + room] int32, "supervised" the same, bool: where the assistant wrote, its end
    token included, which is what a head learns}. UserError if it wrote nothing."""
    lines = {number: line for number, line in enumerate((read_text(path) or "").split("\n"), 1) if line.strip()}
    template, tokens, supervised = guess_template(encoding), [], []
    for number, line in tqdm(lines.items(), "encode", unit="chat", disable=rank() > 0 or None):
        messages = in_order(read_turns(line, f"{path}, line {number}"))
        ids, written = encode(template, messages, encoding) if messages else ([], [])
        padding = length + room - len(ids[:length])
        written = torch.tensor(written[:length] + [False] * padding)
        if (written[:-1] & written[1:]).any():           # room for a root and the token drafted behind it
            tokens.append(torch.tensor(ids[:length] + [0] * padding, dtype=torch.int32))
            supervised.append(written)
    if not tokens:
        raise UserError(f"{path} holds no answer of an assistant within its first {length} tokens: nothing to learn")
    return {"tokens": torch.stack(tokens), "supervised": torch.stack(supervised)}
