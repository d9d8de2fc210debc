"""Chat templates against the strings of the released ones, and their encoding."""
from pathlib import Path

import pytest
import tiktoken

from gto.checkpoint import load_encoding
from gto.released.chat import TEMPLATES, encode, guess_template, stop_ids, turns
from gto.util import UserError

GOLDENS = Path(__file__).resolve().parents[2] / "shared" / "goldens"
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
CHAT = [{"role": "user", "content": " Hi\n"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello."},
        {"role": "user", "content": "Why?"}]
SYSTEM = {"role": "system", "content": "Be brief."}

EXPECTED = {
    "llama3": f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{DATES}Be brief.<|eot_id|>"
              "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n"
              "<think>\nhm\n</think>\n\nHello.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "vicuna": "<s>Be brief. USER: Hi ASSISTANT: <think>\nhm\n</think>\n\nHello.</s>USER: Why? ASSISTANT:",
    "deepseek-r1": "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>Hello."
                   "<｜end▁of▁sentence｜><｜User｜>Why?<｜Assistant｜><think>\n",
    "qwen3": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello."
             "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
}


def render(template, messages):
    return "".join(text for text, _ in turns(template, messages))


def byte_encoding(template):
    """A tokenizer of single bytes with the template's special tokens."""
    text = render(template, [SYSTEM, *CHAT])
    names = [name for name in ("<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                               "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<｜begin▁of▁sentence｜>",
                               "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>") if name in text]
    return tiktoken.Encoding(template, pat_str=r"\S+|\s+", mergeable_ranks={bytes([i]): i for i in range(256)},
                             special_tokens={name: 256 + i for i, name in enumerate(names)})


@pytest.mark.parametrize("template", TEMPLATES)
def test_two_turns_with_a_system_message(template):
    assert render(template, [SYSTEM, *CHAT]) == EXPECTED[template]


def test_without_a_system_message():
    question = [{"role": "user", "content": "Hi"}]
    assert render("llama3", question).startswith(
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{DATES}<|eot_id|><|start_header_id|>user")
    assert render("vicuna", question).startswith("<s>A chat between a curious user and an artificial intelligence")
    assert render("deepseek-r1", question) == "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>\n"
    assert render("qwen3", question).startswith("<|im_start|>user\nHi<|im_end|>")


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_model_writes_its_answers_and_their_end(template):
    """What the loss of a training step is taken on."""
    written = [text for text, by_model in turns(template, CHAT[:2]) if by_model]
    assert len(written) == 1
    assert "Hello." in written[0] and written[0].endswith(tuple(TEMPLATES[template].stops))
    assert not any(by_model for _, by_model in turns(template, CHAT[:1]))


@pytest.mark.parametrize("template", TEMPLATES)
def test_encoding_marks_the_answer(template):
    encoding = byte_encoding(template)
    ids, written = encode(template, CHAT[:2], encoding)
    assert ids == encoding.encode(render(template, CHAT[:2]), allowed_special="all")
    answer = encoding.decode([token for token, by_model in zip(ids, written) if by_model])
    assert answer == next(text for text, by_model in turns(template, CHAT[:2]) if by_model)
    assert stop_ids(template, encoding) == {ids[i] for i in range(len(ids)) if written[i] and ids[i] >= 256}


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_tokenizer_tells_the_template(template):
    assert guess_template(byte_encoding(template)) == template


def test_a_tokenizer_of_no_chat_model():
    with pytest.raises(UserError, match="no chat model"):
        guess_template(tiktoken.Encoding("plain", pat_str=".", mergeable_ranks={b"a": 0}, special_tokens={}))


@pytest.mark.skipif(not GOLDENS.is_dir(), reason="needs the peers' files in ../shared/goldens")
@pytest.mark.parametrize("folder, template", [
    ("tok_llama3style", "llama3"), ("tok_qwenstyle", "qwen3"), ("tok_sentencepiece", "vicuna")])
def test_with_the_peers_tokenizers(folder, template):
    """Turn by turn gives the ids of the whole text: no token crosses the border of a turn."""
    if template == "vicuna":
        pytest.importorskip("sentencepiece")
    encoding = load_encoding(GOLDENS / folder)
    assert guess_template(encoding) == template
    for messages in CHAT[:1], CHAT[:2], [SYSTEM, *CHAT]:
        ids, written = encode(template, messages, encoding)
        assert ids == encoding.encode(render(template, messages), allowed_special="all")
        assert len(written) == len(ids)
    assert set(encoding._special_tokens.values()) >= stop_ids(template, encoding) != set()
