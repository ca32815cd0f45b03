"""Chats: the checkpoint's template, and loss on the assistant's words alone."""

import datetime
import json

import pytest

from gemmaqat.data.chat import TEMPLATE_DATE, ChatTemplate
from gemmaqat.data.packing import encode
from gemmaqat.data.tokenizer import ByteTokenizer

TURNS = """{{ bos_token }}
{%- for m in messages %}
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
<|turn>{{ role }}
{{ m['content'] | trim }}<turn|>
{% endfor %}
{%- if add_generation_prompt %}
<|turn>model
{{ thought }}{% endif %}"""

# Drops the thought of every turn but the last, as templates with reasoning do.
STRIPPING = """
{%- for m in messages %}{{ m['role'][0] }}:
{%- if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('|')[-1] }}
{%- else %}{{ m['content'] }}{% endif %};{% endfor %}
{%- if add_generation_prompt %}a:{% endif %}"""

CHAT = [
    {"role": "user", "content": " one? "},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "second"},
]


def _learned(document) -> list[str]:
    return [piece.text for piece in document.pieces if piece.weight == 1]


def test_loss_lies_on_the_assistants_turns_alone():
    template = ChatTemplate(TURNS, name="t", special_tokens={"bos_token": "<bos>"})
    (document,) = template.documents({"messages": CHAT}, "here")
    assert "".join(p.text for p in document.pieces) == template.render(CHAT)
    assert _learned(document) == ["first<turn|>\n", "second<turn|>\n"]
    assert {piece.weight for piece in document.pieces} == {0.0, 1.0}
    assert not document.end


def test_the_same_words_in_a_prompt_are_not_learned():
    template = ChatTemplate(TURNS, name="t")
    chat = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "first"}]
    (document,) = template.documents({"messages": chat}, "here")
    encoded = encode(document, ByteTokenizer())
    learned = bytes(encoded["targets"][encoded["loss_weights"] > 0].tolist())
    assert learned == b"first<turn|>\n"
    before = bytes(encoded["targets"][encoded["loss_weights"] == 0].tolist()).decode()
    assert before.count("first") == 1


def test_an_empty_thought_in_the_generation_prompt_does_not_hide_the_answer():
    source = TURNS.replace("{{ thought }}", "<|channel>thought\n<channel|>")
    (document,) = ChatTemplate(source, name="t").documents({"messages": CHAT}, "here")
    assert _learned(document) == ["first<turn|>\n", "second<turn|>\n"]


def test_templates_that_rewrite_history_give_a_document_per_turn():
    chat = [dict(m) for m in CHAT]
    chat[1]["content"], chat[3]["content"] = "hm|first", "so|second"
    documents = ChatTemplate(STRIPPING, name="t").documents({"messages": chat}, "here")
    texts = ["".join(piece.text for piece in d.pieces) for d in documents]
    assert texts == ["u: one? ;a:hm|first;", "u: one? ;a:first;u:two?;a:so|second;"]
    assert [_learned(d) for d in documents] == [["hm|first;"], ["so|second;"]]


def test_generation_markers_and_helpers_of_transformers_work():
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m | tojson }}{{ '|' }}{% endif %}{% endfor %}"
    )
    (document,) = ChatTemplate(source, name="t").documents(
        {"messages": [{"role": "user", "content": "é<"}, {"role": "assistant", "content": "yes"}]},
        "here",
    )
    assert _learned(document) == ["yes"]
    assert document.pieces[0].text == '{"role": "user", "content": "é<"}|'


def test_a_template_runs_in_a_sandbox():
    template = ChatTemplate("{{ messages.__class__.__mro__ }}", name="t")
    with pytest.raises(ValueError, match="t refuses the chat"):
        template.render(CHAT)


def test_a_template_that_raises_is_reported_with_the_line():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", name="t.jinja")
    with pytest.raises(ValueError, match=r"a\.jsonl:4: t\.jinja refuses .*roles must alternate"):
        template.documents({"messages": CHAT}, "a.jsonl:4")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "'messages' is str, expected a list"),
        ([], "expected a list"),
        ([{"content": "a"}], r"messages\[0\] has no 'role'"),
        ([{"role": "user"}], r"messages\[0\] has no 'content'"),
        ([{"role": "user", "content": "a"}], "no assistant turn"),
    ],
)
def test_malformed_chats_are_named(messages, message):
    with pytest.raises(ValueError, match=f"a.jsonl:7: .*{message}"):
        ChatTemplate(TURNS, name="t").documents({"messages": messages}, "a.jsonl:7")


def test_the_template_is_found_where_checkpoints_keep_it(tmp_path):
    with pytest.raises(ValueError, match="no chat template there"):
        ChatTemplate.find(str(tmp_path))
    config = {"bos_token": {"content": "<bos>"}, "chat_template": "{{ bos_token }}config"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.find(str(tmp_path)).render([]) == "<bos>config"
    config["chat_template"] = [{"name": "default", "template": "named"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.find(str(tmp_path / "tokenizer.json")).render([]) == "named"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file")
    assert ChatTemplate.find(str(tmp_path)).render([]) == "<bos>file"
    assert ChatTemplate.find(str(tmp_path / "chat_template.jinja")).render([]).endswith("file")


def test_a_template_does_not_depend_on_the_day():
    template = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", name="t")
    assert template.render([]) == TEMPLATE_DATE.date().isoformat() != str(datetime.date.today())


def test_a_fingerprint_is_of_the_template_and_its_tokens():
    def make(source, token):
        return ChatTemplate(source, name="t", special_tokens={"bos_token": token}).fingerprint

    assert make(TURNS, "<bos>") == make(TURNS, "<bos>")
    assert len({make(TURNS, "<bos>"), make(TURNS, "<s>"), make(STRIPPING, "<bos>")}) == 3


@pytest.mark.parametrize("tools", [[{"name": "add"}], '[{"name": "add"}]'], ids=["list", "text"])
def test_tools_reach_the_template(tools):
    source = "{% for t in tools %}{{ t.name }}|{% endfor %}" + TURNS
    (document,) = ChatTemplate(source, name="t").documents(
        {"messages": CHAT, "tools": tools}, "here"
    )
    assert document.pieces[0].text.startswith("add|")


@pytest.mark.parametrize(
    ("tools", "message"), [("{", "'tools' is not valid JSON"), ({}, "'tools' is dict, expected")]
)
def test_malformed_tools_are_named(tools, message):
    with pytest.raises(ValueError, match=f"a.jsonl:7: {message}"):
        ChatTemplate(TURNS, name="t").documents({"messages": CHAT, "tools": tools}, "a.jsonl:7")


def test_a_broken_template_is_named():
    with pytest.raises(ValueError, match="x.jinja: not a valid Jinja template"):
        ChatTemplate("{% for %}", name="x.jinja")
