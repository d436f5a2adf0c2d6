"""Examples to fine-tune on, as lines of JSON: a prompt and its completion, or the messages of a conversation.

    {"prompt": "...", "completion": "..."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

`source` names where an example is from; `tools` beside messages are what the template makes of them. Other keys are not
read. The files are those of raw.py with lines of JSON, compressed or not.
"""

from __future__ import annotations

import dataclasses

from btlm_jax.tokenizers.chat_template import ASSISTANT, ROLES

_PROMPT, _COMPLETION, _MESSAGES = "prompt", "completion", "messages"
# Keys of examples in other forms, and of parts of one.
_MEANT = frozenset(
    (_PROMPT, _COMPLETION, _MESSAGES, "conversations", "conversation", "instruction", "response", "chosen", "question")
)
_OTHER_ROLES = {"human": "user", "gpt": ASSISTANT, "ai": ASSISTANT, "bot": ASSISTANT, "model": ASSISTANT}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A prompt and what is to be written after it."""

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages, of which the assistant's are to be written."""

    messages: tuple[dict, ...]
    tools: list | None


Example = Pair | Conversation


def is_example(body: object) -> bool:
    """Return whether a line of JSON is meant as an example: not as a document, which has a text."""
    if not isinstance(body, dict) or "text" in body:
        return False
    return isinstance(body.get(_MESSAGES), list) or {_PROMPT, _COMPLETION} <= body.keys()


def not_readable_as(body: object) -> str:
    """Return why a line of JSON is neither an example nor a document, where what is meant can be told; otherwise ""."""
    if isinstance(body, list):
        return "is a JSON array, not lines of JSON: jq -c '.[]' FILE > LINES.jsonl makes lines of it"
    if not isinstance(body, dict) or "text" in body or is_example(body) or not body.keys() & _MEANT:
        return ""
    keys = ", ".join(sorted(map(str, body))[:6])
    return (
        f"has lines with the keys {keys}, which are no examples to fine-tune on; these "
        f'have "{_PROMPT}" and "{_COMPLETION}", or "{_MESSAGES}" (a list of "role" and "content"); rename or add keys'
    )


def source_of(body: object, *, default: str) -> str:
    """Return where a line's example is from."""
    source = body.get("source") if isinstance(body, dict) else None
    return source if isinstance(source, str) and source else default


def parse_example(body: object) -> Example:
    """Return the example of a line.

    Raises:
      ValueError: it is none.
    """
    if not isinstance(body, dict):
        raise ValueError(f"not an object but {type(body).__name__}")
    if _MESSAGES in body:
        if _COMPLETION in body:
            raise ValueError(f"it has both {_MESSAGES} and a {_COMPLETION}; leave one of them out")
        return _conversation(body[_MESSAGES], body.get("tools"))
    if _PROMPT not in body and _COMPLETION not in body:
        keys = ", ".join(sorted(map(str, body))[:6]) or "none"
        raise ValueError(f"there are neither {_MESSAGES} nor {_PROMPT} and {_COMPLETION}; its keys are {keys}")
    for key in (_PROMPT, _COMPLETION):
        if key not in body:
            raise ValueError(f"there is no {key}")
        if not isinstance(body[key], str):
            raise ValueError(f"{key} is {_kind(body[key])}, not a text")
    if not body[_COMPLETION]:
        raise ValueError(f"the {_COMPLETION} is empty")
    return Pair(prompt=body[_PROMPT], completion=body[_COMPLETION])


def _conversation(messages: object, tools: object) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{_MESSAGES} are {_kind(messages)}, not a list of messages" if messages else "no messages")
    if not (tools is None or isinstance(tools, list)):
        raise ValueError(f"tools are {_kind(tools)}, not a list")
    for number, message in enumerate(messages, start=1):
        if reason := _defect(message):
            raise ValueError(f"message {number} {reason}")
    if not any(message["role"] == ASSISTANT for message in messages):
        raise ValueError(f"no message is the {ASSISTANT}'s, so there is nothing to train on")
    return Conversation(messages=tuple(messages), tools=tools or None)


def _defect(message: object) -> str:
    """Return what is wrong with a message, or ""."""
    if not isinstance(message, dict):
        return f"is {_kind(message)}, not an object"
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        if role is None:
            return "has no role" + ("; its keys are from and value: rename them" if "from" in message else "")
        meant = f"; {_OTHER_ROLES[role]} is meant?" if isinstance(role, str) and role in _OTHER_ROLES else ""
        return f"has the role {role!r}; roles are {', '.join(ROLES)}{meant}"
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, str):
        return f"has {'no content' if content is None else f'content that is {_kind(content)}, not a text'}"
    return f"of the {ASSISTANT} is empty" if role == ASSISTANT and not content and not message.get("tool_calls") else ""


def _kind(value: object) -> str:
    names = {str: "a text", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
