"""Chat templates: messages to one text, and the parts of it that an assistant wrote. The only importer of jinja2.

A template is Jinja, as in a Hugging Face tokenizer's files, and is rendered as transformers 5 does
(transformers/utils/chat_template_utils.py): in a sandbox, with `messages`, `tools`, `add_generation_prompt` and the
names of the special tokens. What the assistant wrote is what stands in its blocks

    {% generation %} ... {% endgeneration %}

and of a template without such blocks, the difference of prefixes: of the assistant's message i, what the first i + 1
messages have more than the first i with a generation prompt after them; white space after a special token that ends it
is left out. Where the texts of more messages do not begin with those of fewer, such a template is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from typing import cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.sandbox import ImmutableSandboxedEnvironment

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
ASKS_TIME = "strftime_now"  # the function by which a template does
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What Jinja lets through of what a template's expressions raise.
_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)

Span = tuple[int, int]  # (begin, end) in characters


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenderedChat:
    """A conversation as text, and the spans of it that an assistant wrote, in order."""

    text: str
    spans: tuple[Span, ...]


class ChatTemplate:
    """A compiled template."""

    def __init__(
        self, source: str, *, name: str, variables: dict[str, str], special_tokens: Collection[str], now: datetime
    ):
        """Compile a template.

        `name` is what errors call it; `variables` are the texts of bos_token, eos_token, ..., as
        `special_tokens.read_variables` has them; `special_tokens` those of all special tokens; `now` is what a template
        is told that asks for the date.

        Raises:
          ValueError: it is not Jinja.
        """
        self.source, self.name = source, name
        self._variables = variables
        self._special_tokens = tuple(filter(None, special_tokens))
        self.has_generation_blocks = _GENERATION.search(source) is not None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, LoopControls]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_exception, ASKS_TIME: now.strftime}
        environment.globals |= {"dict": _make_dict, "namespace": _Namespace}
        self._blocks = cast(_GenerationBlocks, environment.extensions[_GenerationBlocks.identifier])
        try:
            self._template = environment.from_string(source)
        except (*_ERRORS, SyntaxError) as error:
            raise ValueError(f"the chat template {name} cannot be read: {error}") from error

    def render(self, messages: Sequence[dict], *, tools: list | None = None) -> RenderedChat:
        """Render a whole conversation. Keys of a message that are null are left out.

        Raises:
          ValueError: the template refuses the messages, or has no generation blocks and texts of more messages do not
            begin with those of fewer.
        """
        present = [{key: value for key, value in message.items() if value is not None} for message in messages]
        text, spans = self._rendered(present, tools=tools, add_generation_prompt=False)
        if not self.has_generation_blocks:
            spans = tuple(self._span(present, number, text, tools=tools) for number in _numbers_of_assistant(present))
        return RenderedChat(text=text, spans=spans)

    def _span(self, messages: list[dict], number: int, text: str, *, tools: list | None) -> Span:
        """Return the span of a message of the assistant in the text of all messages, by difference of prefixes."""
        before, _ = self._rendered(messages[:number], tools=tools, add_generation_prompt=True)
        after, _ = self._rendered(messages[: number + 1], tools=tools, add_generation_prompt=False)
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"the chat template {self.name} has no generation blocks, and by it the text of the first {number} "
                f"messages and a generation prompt is not the beginning of that of {number + 1} or of all: what the "
                "assistant wrote cannot be told; put {% generation %} and {% endgeneration %} around that in a copy "
                "of the template, and give it by --template=FILE"
            )
        end = len(after)
        bare = after[len(before) :].rstrip()
        if bare.endswith(self._special_tokens):
            end = len(before) + len(bare)
        return len(before), end

    def _rendered(
        self, messages: list[dict], *, tools: list | None, add_generation_prompt: bool
    ) -> tuple[str, tuple[Span, ...]]:
        try:
            with self._blocks.tracked() as (pieces, spans):
                for piece in self._template.generate(
                    messages=messages,
                    tools=tools,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self._variables,
                ):
                    pieces.append(piece)  # at once: blocks ask where they are
        except _ERRORS as error:
            raise ValueError(f"the chat template {self.name} cannot render it: {error}") from error
        return "".join(pieces), tuple(spans)


class _GenerationBlocks(Extension):
    """The blocks {% generation %}: notes where they are in the text that is rendered."""

    tags = {"generation"}

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        self._pieces: list[str] = []
        self._spans: list[Span] = []

    @contextlib.contextmanager
    def tracked(self) -> Iterator[tuple[list[str], list[Span]]]:
        """Yield a list to append each rendered piece to at once, and that of the spans found by then."""
        self._pieces, self._spans = [], []
        yield self._pieces, self._spans

    def parse(self, parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller) -> str:
        written = caller()
        begin = sum(map(len, self._pieces))
        self._spans.append((begin, begin + len(written)))
        return written


def _numbers_of_assistant(messages: Sequence[dict]) -> list[int]:
    return [number for number, message in enumerate(messages) if message.get("role") == ASSISTANT]


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore, which lead out of the sandbox."""

    def __init__(*args, **values):  # `self` may be one of the values
        self, *positional = args
        for name in dict(*positional, **values):
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, *positional, **values)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the name {name!r}")


def _make_dict(*args, **values) -> dict:
    return dict(*args, **values)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: object, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Unlike Jinja's own filter this escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
