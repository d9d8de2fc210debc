"""Conversations -> training texts for the head of a released target: what the assistant said is what is learnt."""
import torch
from tqdm import tqdm

from gto import chat, parallel
from gto.corpus import read_turns
from gto.errors import UserError

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}     # ShareGPT's and others' -> ours


def read_conversations(path):
    """The messages of every line of a chat .jsonl, [[{"role", "content"}]], in the order user, assistant, user, ...

    Lines are as in prepare_data.py: "messages" [{role, content}], ShareGPT's "conversations" [{from, value}], or
    "turns". An answer that stands first is dropped (ShareGPT's parts of longer talks); at a turn out of order, or
    empty, the rest of the conversation is.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the conversations {path}: {error}") from None
    return [in_order(read_turns(line, f"{path}, line {number}")) for number, line in lines]


def in_order(turns):
    """[(role, text)] in anybody's names -> messages that a chat template takes; [] if none are left."""
    turns = [(ROLES.get(role, role), text.strip()) for role, text in turns]
    messages = []
    if turns and turns[0][0] == "system":
        _, text = turns.pop(0)
        messages = [{"role": "system", "content": text}]
    if turns and turns[0][0] == "assistant":
        turns.pop(0)
    for i, (role, text) in enumerate(turns):
        if role != ("user", "assistant")[i % 2] or not text:
            break
        messages.append({"role": role, "content": text})
    return messages if messages and messages[-1]["role"] != "system" else []


def encode_conversations(path, encoding, length, room):
    """All conversations, cut to `length` tokens and padded on the right, with `room` to spare, as
    {"tokens" [n, length + room] int32, "supervised" [n, length + room] bool: by the assistant, its end token included}.
    """
    template = chat.guess_template(encoding)
    tokens, supervised, read = [], [], read_conversations(path)
    for messages in tqdm(read, desc="encode", unit="chat", disable=parallel.rank() > 0 or None):
        if not messages:
            continue
        ids, written = chat.encode(template, messages, encoding)
        padding = length + room - len(ids[:length])
        written = torch.tensor(written[:length] + [False] * padding)
        if (written[:-1] & written[1:]).any():          # room for a root and the token drafted behind it
            tokens.append(torch.tensor(ids[:length] + [0] * padding, dtype=torch.int32))
            supervised.append(written)
    if not tokens:
        raise UserError(f"{path} holds no answer of an assistant within its first {length} tokens: nothing to learn")
    if parallel.rank() == 0 and len(tokens) < len(read):
        print(f"{len(read) - len(tokens)} of {len(read)} conversations hold no answer to learn from", flush=True)
    return {"tokens": torch.stack(tokens), "supervised": torch.stack(supervised)}
