"""Chat templates of the supported targets, as plain functions from messages to text.

A template returns turns: (text, written) pairs, `written` marking what the model itself writes, its end token
included: training takes its loss there. Joined, the turns are the text; after a message of the user it ends where the
model's answer begins. Templates contain their beginning-of-text token. As in Hugging Face's tokenizers, a special
token that somebody typed into a message counts as one.
"""
from gto.errors import UserError
from gto.tokenizer import SentencePieceEncoding, special_tokens


def llama3(messages):
    """Llama 3.1 and 3.3 Instruct. The date lines are in the released template even if nobody sets a system message."""
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    system, messages = split_system(messages)
    turns = [(f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{dates}{system}<|eot_id|>", False)]
    answer = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    for role, content in messages:
        if role == "user":
            turns.append((f"<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>{answer}", False))
        else:
            turns.append((f"{content}<|eot_id|>", True))
    return turns


def vicuna(messages):
    system, messages = split_system(messages)
    system = system or ("A chat between a curious user and an artificial intelligence assistant. The assistant gives "
                        "helpful, detailed, and polite answers to the user's questions.")
    turns = []
    for role, content in messages:
        if role == "user":
            turns.append((f"{'' if turns else f'<s>{system} '}USER: {content} ASSISTANT:", False))
        else:
            turns.append((f" {content}</s>", True))
    return turns


def deepseek_r1(messages):
    """DeepSeek-R1-Distill. Thoughts are dropped from earlier answers; the next answer is made to begin with one."""
    system, messages = split_system(messages)
    turns = [(f"<｜begin▁of▁sentence｜>{system}", False)]
    for i, (role, content) in enumerate(messages):
        last = i == len(messages) - 1
        if role == "user":
            turns.append((f"<｜User｜>{content}<｜Assistant｜>" + ("<think>\n" if last else ""), False))
        else:
            turns.append(((content if last else without_thought(content)) + "<｜end▁of▁sentence｜>", True))
    return turns


def qwen3(messages):
    """Qwen3 with thinking switched off: the answer follows an empty thought."""
    system, messages = split_system(messages)
    turns = [(f"<|im_start|>system\n{system}<|im_end|>\n", False)] if system else []
    for i, (role, content) in enumerate(messages):
        if role == "user":
            thought = "<think>\n\n</think>\n\n" if i >= len(messages) - 2 else ""
            turns.append((f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n{thought}", False))
        else:
            turns += [(f"{without_thought(content)}<|im_end|>", True), ("\n", False)]
    return turns


def split_system(messages):
    """[{"role", "content"}] -> the system message's text or "", and [(role, text)] of user and assistant in turns."""
    pairs = [(message["role"], message["content"].strip()) for message in messages]
    system = pairs.pop(0)[1] if pairs and pairs[0][0] == "system" else ""
    expected = ["user", "assistant"] * len(pairs)
    if not pairs or any(role != wanted for (role, _), wanted in zip(pairs, expected)):
        raise UserError("a conversation is an optional system message, then user and assistant in turns, the user "
                        f"first; this one is {', '.join(m['role'] for m in messages) or 'empty'}")
    return system, pairs


def without_thought(answer):
    return answer.split("</think>")[-1].strip()


TEMPLATES = {"llama3": llama3, "vicuna": vicuna, "deepseek-r1": deepseek_r1, "qwen3": qwen3}
# A special token that only this family of tokenizers has. R1's was made from Llama 3's and may keep its tokens.
SIGNS = {"deepseek-r1": "<｜User｜>", "llama3": "<|start_header_id|>", "qwen3": "<|im_start|>", "vicuna": "</s>"}
# What ends an answer.
STOPS = {"llama3": ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"], "vicuna": ["</s>"],
         "deepseek-r1": ["<｜end▁of▁sentence｜>"], "qwen3": ["<|im_end|>", "<|endoftext|>"]}


def turns(template, messages):
    """A conversation as [(text, written)], for encoding.encode(text, allowed_special="all").

    template   one of TEMPLATES; messages: [{"role": "system", "user" or "assistant", "content": str}, ...]
    """
    if template not in TEMPLATES:
        raise UserError(f"no chat template '{template}': choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[template](messages)


def encode(template, messages, encoding):
    """The ids of a conversation, and for each whether the model wrote it: two lists of equal length."""
    ids, written = [], []
    for text, by_model in turns(template, messages):
        if isinstance(encoding, SentencePieceEncoding):
            text = text.removeprefix(" ")                         # SentencePiece puts a blank in front of every piece
        part = encoding.encode(text, allowed_special="all")
        ids += part
        written += [by_model] * len(part)
    return ids, written


def guess_template(encoding):
    """The template's name, by the tokenizer's special tokens. UserError if none fits: it is no chat model we know."""
    specials = special_tokens(encoding)
    for template, sign in SIGNS.items():
        if sign in specials:
            return template
    raise UserError(f"the tokenizer {encoding.name} is of no chat model known here ({', '.join(TEMPLATES)})")


def stop_ids(template, encoding):
    """Ids that end an answer, for Engine.generate(stop=...)."""
    specials = special_tokens(encoding)
    return {specials[token] for token in STOPS[template] if token in specials}
