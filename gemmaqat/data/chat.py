"""Chats through the checkpoint's own Jinja template, with loss on the assistant's turns alone.

The template is rendered in a sandbox with the same settings and helpers that transformers gives
it. Where a turn begins is found by rendering the chat up to it with the generation prompt, so
templates without generation markers work.
"""

import datetime
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gemmaqat.data.documents import Document, Piece
from gemmaqat.data.tokenizer import read_tokenizer_config

ASSISTANT_ROLES = ("assistant", "model")

# What templates take for today: the same chat is the same text on every day.
TEMPLATE_DATE = datetime.datetime(2026, 1, 1)


class ChatTemplate:
    """A compiled chat template and the special tokens it may name.

    Attributes:
        name: of its file, for errors.
        fingerprint: hash of the template, the special tokens and the date it is given.
    """

    def __init__(self, source: str, *, name: str, special_tokens: Mapping[str, str] | None = None):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
        self.name = name
        self._special_tokens = dict(special_tokens or {})
        facts = [source, sorted(self._special_tokens.items()), TEMPLATE_DATE.isoformat()]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(
                f"{name}: not a valid Jinja template ({error}); copy the checkpoint's again."
            ) from None

    @classmethod
    def find(cls, path: str) -> "ChatTemplate":
        """The template of a checkpoint folder (or beside a tokenizer file), or a template file.

        Raises:
            ValueError: there is none; chats cannot be rendered by guessing.
        """
        place = Path(path).expanduser()
        if place.is_file() and place.suffix in (".jinja", ".j2"):
            return cls(place.read_text(), name=str(place))
        folder = place if place.is_dir() else place.parent
        config = read_tokenizer_config(folder)
        tokens = {key: _text_of(value) for key, value in config.items() if key.endswith("_token")}
        file = folder / "chat_template.jinja"
        if file.is_file():
            return cls(file.read_text(), name=str(file), special_tokens=tokens)
        source = config.get("chat_template")
        if isinstance(source, list):  # several named templates
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not isinstance(source, str):
            raise ValueError(
                f"{path}: no chat template there (chat_template.jinja, or 'chat_template' in "
                "tokenizer_config.json); set data.chat_template to the checkpoint's folder."
            )
        return cls(source, name=str(folder / "tokenizer_config.json"), special_tokens=tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """The chat as the model reads it.

        Raises:
            ValueError: the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=list(messages),
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"{self.name} refuses the chat: {error}") from None

    def documents(self, record: Mapping[str, Any], where: str) -> list[Document]:
        """A chat as documents whose loss lies on the assistant's turns.

        One document, if the template renders every turn the same whatever follows. Some drop an
        earlier turn's thoughts; then each assistant turn gets a document of its own, ending with
        that turn, which is what the model sees when it answers.

        Raises:
            ValueError: no assistant turn, malformed messages, or a template that refuses them.
        """
        messages, turns = check_messages(record.get("messages"), where)
        tools = _tools(record.get("tools"), where)
        try:
            ends = {i: self.render(messages[: i + 1], tools=tools) for i in turns}
            starts = {
                i: self.render(messages[:i], add_generation_prompt=True, tools=tools) for i in turns
            }
            before = {i: self.render(messages[:i], tools=tools) for i in turns}
            whole = self.render(messages, tools=tools)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        for i in turns:
            if not ends[i].startswith(before[i]):
                raise ValueError(
                    f"{where}: {self.name} renders the turns before message {i} differently once "
                    "that message follows, so its answer cannot be told from its prompt."
                )
        spans = [(i, _common_prefix(starts[i], ends[i])) for i in turns]
        if all(whole.startswith(ends[i]) for i in turns):
            return [_masked(whole, [(start, len(ends[i])) for i, start in spans], where)]
        return [_masked(ends[i], [(start, len(ends[i]))], where) for i, start in spans]


def _masked(text: str, spans: Sequence[tuple[int, int]], where: str) -> Document:
    """Weight 1 inside the spans, 0 outside."""
    pieces, end = [], 0
    for start, stop in spans:
        pieces += [Piece(text[end:start], 0.0), Piece(text[start:stop], 1.0)]
        end = stop
    pieces.append(Piece(text[end:], 0.0))
    return Document(tuple(p for p in pieces if p.text), where, end=False)


def _common_prefix(prompt: str, rendered: str) -> int:
    """Length of the shared start.

    Usually the whole prompt; a template may put an empty thought into the generation prompt that
    it leaves out of a finished turn.
    """
    return len(os.path.commonprefix([prompt, rendered]))


def check_messages(messages: Any, where: str) -> tuple[list[dict[str, Any]], list[int]]:
    """The messages of a chat, and which of them are the assistant's.

    Raises:
        ValueError: malformed messages, or no assistant turn.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{where}: 'messages' is {type(messages).__name__}, expected a list of objects with "
            "'role' and 'content'."
        )
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(
                f"{where}: messages[{number}] has no 'role'; expected an object with 'role' and "
                "'content'."
            )
        if "content" not in message and "tool_calls" not in message:
            raise ValueError(f"{where}: messages[{number}] has no 'content'.")
    turns = [i for i, message in enumerate(messages) if message["role"] in ASSISTANT_ROLES]
    if not turns:
        raise ValueError(
            f"{where}: the chat has no assistant turn to learn from; remove it or add one."
        )
    return [dict(message) for message in messages], turns


def _tools(tools: Any, where: str) -> list[Any] | None:
    """A list, or its JSON text: tables cannot hold tools of different forms otherwise."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: 'tools' is not valid JSON ({error}).") from None
    if tools is None or isinstance(tools, list):
        return tools
    raise ValueError(f"{where}: 'tools' is {type(tools).__name__}, expected a list.")


def _text_of(token: Any) -> str:
    return token.get("content", "") if isinstance(token, Mapping) else str(token)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _GenerationTag(Extension):
    """`{% generation %}` marks assistant text for other tools; here it is transparent."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The block renders as its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_body")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()
