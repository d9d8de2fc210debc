"""Chat templates, the models' own, and conversations as training texts, given or written by the target itself.
A template is a Jinja program that comes with the model. It runs in a sandbox, as Hugging Face's apply_chat_template
would run it, and writes its beginning-of-text token itself. A special token that somebody typed counts as one."""
import json
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from tqdm import tqdm

from gto.data import read_conversations, read_prompts, read_text
from gto.engine import Engine
from gto.released.files import locate, read_gguf, read_json
from gto.released.tokenizers import SentencePieceEncoding
from gto.tokenizer import END_OF_TEXT_NAMES, StreamDecoder
from gto.util import UserError, rank, reading, wait, write_whole
from gto.verify import Sampling

MARK = "\ue000"                     # a character nobody uses, where a message's text would stand
KNOWN = {"</s>": "vicuna.jinja", "<|start_header_id|>": "llama3.jinja"}   # for models that bring none, by a token
QUESTION, LONG_ENOUGH = 64, 8       # tokens of one, at most; characters, at least: lone words all get the same answer


class Chat(NamedTuple):
    encoding: Any
    template: Any                   # compiled
    before: str                     # what the template puts between a prompt and an answer (Vicuna's: a blank),
    behind: str                     # and behind it, up to its end token
    stops: set                      # ids that end an answer, for Engine.generate(stop=...)


def load(source, encoding):
    """The chat format of a released model: its folder, a file in it, a *.gguf or "smollm2"."""
    specials = encoding._special_tokens
    with reading(f"the chat template of {source}"):
        template, names = read_config(source)
        known = [file for token, file in KNOWN.items() if token in specials]
        if not template and not known:
            raise ValueError("there is none, and the tokenizer is of no chat model")
        template = template or read_text(Path(__file__).with_name(known[0]))
        chat = Chat(encoding, compile_template(template, names), "", "", set())
    question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}
    prompt = render(chat, [question], generate=True)
    text, _, rest = render(chat, [question, answer]).partition(MARK)
    behind = rest[:min((rest.index(token) + len(token) for token in specials if token in rest), default=None)]
    ends = (names.get("eos_token"), *END_OF_TEXT_NAMES)
    stops = {number for token, number in specials.items() if token in ends or token in behind}
    return chat._replace(before=text[len(prompt):], behind=behind, stops=stops)


def read_config(source):
    """-> the template that comes with a model, if any, and its special tokens, {"bos_token": text, ...}."""
    if file := locate(source):
        about = {key.split(".")[-1]: value for key, value in read_gguf(file)[0].items()}
        return about.get("chat_template"), {name: about["tokens"][about[f"{name}_id"]]
                                            for name in ("bos_token", "eos_token") if f"{name}_id" in about}
    folder = Path(source).parent if Path(source).is_file() else Path(source)
    config = read_json(path) if (path := folder / "tokenizer_config.json").is_file() else {}
    template = read_text(folder / "chat_template.jinja") or config.get("chat_template")
    if isinstance(template, list):                                # several, for tools and the like
        template = {each["name"]: each["template"] for each in template}["default"]
    return template, {name: token["content"] if isinstance(token, dict) else token for name, token in config.items()
                      if name.endswith("_token") and isinstance(token, (dict, str))}


def compile_template(text, names):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise ValueError(message)

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    jinja.filters["tojson"] = lambda x, **how: json.dumps(x, **{"ensure_ascii": False} | how)
    jinja.globals |= {"raise_exception": refuse, "strftime_now": time.strftime, **names}
    # {% generation %}, Hugging Face's own, is round what a model writes and changes nothing, just as `with`.
    return jinja.from_string(re.sub(r"(\{%[-+]?\s*(?:end)?)generation(?=\s*[-+]?%\})", r"\1with", text))


def render(chat, messages, generate=False):
    """A conversation, [{"role", "content"}], as text; generate: up to where the answer begins. Thinking is off."""
    with reading(f"the chat template of {chat.encoding.name}"):
        return chat.template.render(messages=messages, tools=None, documents=None, add_generation_prompt=generate,
                                    enable_thinking=False)


def encode_turns(chat, texts):
    """The ids of texts of user and assistant in turn, up to where the next answer begins."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return chat.encoding.encode(render(chat, messages, generate=True), allowed_special="all")


def user_prefix(chat):
    """The ids before the user's first message. A blank at the end is left to that: tokenizers join it to a word."""
    text = render(chat, [{"role": "user", "content": MARK}]).partition(MARK)[0]
    return chat.encoding.encode(text.removesuffix(" "), allowed_special="all")


def rows(chat, messages):
    """A conversation as training rows [(id, written), ...]. `written` marks what the model writes itself, end token
    included. A template that rewrites what was before (Qwen3's and R1's drop thoughts) begins a new row there."""
    found, row = [], ""                                           # row: the text of the last one
    for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        prompt, answer = render(chat, messages[:i], generate=True), messages[i]["content"]
        if prompt.endswith("<think>\n"):                          # R1's has begun the thought,
            answer = answer.removeprefix("<think>\n")
        elif prompt.endswith("</think>\n\n"):                     # Qwen3's has ended it
            answer = answer.rpartition("</think>")[2].lstrip()
        answer = chat.before + answer + chat.behind
        if not found or not prompt.startswith(row):
            found, row = [*found, []], ""
        for part, written in (prompt[len(row):], False), (answer, True):
            part = part.removeprefix(" ") if isinstance(chat.encoding, SentencePieceEncoding) else part   # it adds one
            found[-1].extend((token, written) for token in chat.encoding.encode(part, allowed_special="all"))
        row = prompt + answer
    return found


def in_order(turns):
    """[(role, text)] of `read_conversations` -> messages that `rows` takes. An answer that stands first is dropped
    (ShareGPT's parts of longer talks); at a turn out of order, or empty, the rest of the conversation is."""
    turns = [(role, text.strip()) for role, text in turns]
    system = [turns.pop(0)] if turns and turns[0][0] == "system" else []
    if turns and turns[0][0] == "assistant":
        turns.pop(0)
    end = next((i for i, (role, text) in enumerate(turns) if not text or role != ("user", "assistant")[i % 2]), None)
    return [{"role": role, "content": text} for role, text in system + turns[:end]]


def encode_conversations(path, chat, length, room):
    """The conversations of a chat .jsonl as `rows`, cut to `length` tokens and padded with `room` to
    spare. -> tokens, int32, and what the assistant wrote, which a head learns, bool, both [n, length + room]."""
    found = []
    for turns in tqdm(read_conversations(path), "encode", disable=rank() > 0 or None):
        for row in rows(chat, in_order(turns)):
            row = pad(torch.tensor(row, dtype=torch.int32).T, (0, length - len(row)))  # [2, length], perhaps cut
            if (row[1, :-1] & row[1, 1:]).any():                  # room for a root and the token drafted behind it
                found.append(pad(row, (0, room)))
    if not found:
        raise UserError(f"{path} holds no answer of an assistant within its first {length} tokens: nothing to learn")
    tokens, supervised = torch.stack(found, dim=1)
    return tokens, supervised.bool()


def conversations(config, out, target, chat):
    """What heads are trained on without --data: config.texts conversations, which the target writes to out/chats.jsonl.
    Where its template puts a user's text, it writes what one might ask (Magpie, arXiv 2406.08464). Then it answers,
    every other batch greedily. -> tokens, supervised [n, config.length + config.unroll]."""
    def converse(questions, number):
        prompts = [encode_turns(chat, [text]) for text in questions]
        temperature = float(number // config.text_batch % 2)
        answers = write(target, chat, prompts, config.length - min(map(len, prompts)), temperature)
        return [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
                for question, (answer, _) in zip(questions, answers) if answer]

    data = out / "chats.jsonl"
    append_lines(data, target, chat, config.texts, config.text_batch, config.seed, converse)
    for (_, question), (_, answer) in read_conversations(data, 3):
        print(f"> {question}\n{answer}\n")
    return encode_conversations(data, chat, config.length, config.unroll)


def held_out(config, out, target, chat):
    """Prompts of which no head has seen an answer, lists of ids: questions of the target's own, out/prompts.jsonl."""
    path, count = out / "prompts.jsonl", config.eval_prompts * 5 // 4
    append_lines(path, target, chat, count, count, config.seed + 1,
                 lambda questions, _: [{"turns": [question]} for question in questions])
    return [encode_turns(chat, turns) for turns in read_prompts(path)]


def append_lines(path, target, chat, count, batch, seed, records):
    """Append records(what users might ask, number of the next line) to an interrupted run's, up to `count` lines."""
    lines, prefix = read_text(path).splitlines(), user_prefix(chat)
    with tqdm(total=count, initial=len(lines), desc=path.stem, unit="line", disable=rank() > 0) as bar:
        while len(lines) < count:
            torch.manual_seed(seed * 1_000_003 + len(lines))
            written = write(target, chat, [prefix] * min(batch, 16 + 2 * (count - len(lines))), QUESTION, 1.0)
            questions = list(dict.fromkeys(text for text, ended in written if ended and len(text) >= LONG_ENOUGH))
            if not questions:
                raise UserError("the target writes no questions, so it is no chat model: give --data chat.jsonl")
            lines += [json.dumps(record) for record in records(questions, len(lines))][:count - len(lines)]
            if rank() == 0:
                write_whole(path, "\n".join(lines) + "\n")
            bar.update(len(lines) - bar.n)
    wait()


def write(target, chat, prompts, most, temperature):
    """Continue prompts (lists of ids) to a stop token or by `most` tokens. -> [(text without the stop, ended)]."""
    engine = Engine(target, None, None, Sampling(temperature), len(prompts), max(map(len, prompts)) + most)
    rows = [sum(parts, []) for parts in zip(*engine.generate(prompts, most, chat.stops))]
    return [(StreamDecoder(chat.encoding).push(token for token in row if token not in chat.stops).strip(),
             row[-1] in chat.stops) for row in rows]
