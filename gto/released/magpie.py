"""A chat target writes the conversations that its draft head learns from: given its template up to where a user's text
begins, it writes what a user might ask (Magpie, arXiv 2406.08464). Then it answers."""
import json

import torch
from tqdm import tqdm

from gto.data import read_conversations, read_prompts, read_text
from gto.engine import Engine
from gto.released.chat import encode_conversations, encode_turns, user_prefix
from gto.tokenizer import StreamDecoder
from gto.util import UserError, rank, wait, write_text
from gto.verify import Sampling

QUESTION = 64     # tokens, at most
LONG_ENOUGH = 8   # characters of a question: a lone word, or a greeting, makes every answer the same


def conversations(config, out, target, chat):
    """What heads are trained on: what the target writes into out/chats.jsonl, config.texts conversations, every other
    batch greedy. -> tokens, supervised [n, config.length + config.unroll]."""
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
                write_text(path, "\n".join(lines) + "\n")
            bar.update(len(lines) - bar.n)
    wait()


def write(target, chat, prompts, most, temperature):
    """Continue prompts (lists of ids) to a stop token or by `most` tokens. -> [(text without the stop, ended)]."""
    engine = Engine(target, None, None, Sampling(temperature), len(prompts), max(map(len, prompts)) + most)
    rows = [sum(parts, []) for parts in zip(*engine.generate(prompts, most, chat.stops))]
    return [(StreamDecoder(chat.encoding).push(token for token in row if token not in chat.stops).strip(),
             row[-1] in chat.stops) for row in rows]
