"""Examples to ids and what of them is trained: the tokens of completions, and the token that ends each.

A pair's ids are those of the prompt as `btlm generate` makes them, those of the completion encoded after it, and the
end of text. A conversation's are those of the text that the chat template makes of it; trained are the tokens that
overlap what the assistant wrote, as in transformers. The first token is never trained: nothing stands before it.
"""

from __future__ import annotations

import dataclasses
from datetime import datetime
from pathlib import Path

import numpy as np

from btlm_jax.corpus.readers.examples import Conversation, Example, Pair
from btlm_jax.tokenizers.chat_template import ChatTemplate
from btlm_jax.tokenizers.gpt2 import fastest_tokenizer
from btlm_jax.tokenizers.named_templates import NAMED_TEMPLATES
from btlm_jax.tokenizers.prompt_bos import prompt_ids, read_prompt_bos
from btlm_jax.tokenizers.special_tokens import read_variables
from btlm_jax.tokenizers.tokenizer import Tokenizer, find_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EncodedExample:
    """The ids of an example, and which of them are trained, of the same length."""

    ids: np.ndarray  # int64
    is_trained: np.ndarray  # bool

    @property
    def prompt(self) -> np.ndarray:
        """The ids before the first that is trained."""
        return self.ids[: int(self.is_trained.argmax())]

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, length: int) -> EncodedExample:
        """Return the first `length` ids."""
        return EncodedExample(ids=self.ids[:length], is_trained=self.is_trained[:length])


def make_encoder(
    directory: Path, *, template: tuple[str, str], now: datetime, allow_lossy: bool = False
) -> ExampleEncoder:
    """Return an encoder with the tokenizer of a directory; `template` is the source and the name of a chat template.

    `now` is what a template is told that asks for the date.

    Raises:
      FileNotFoundError, ValueError: the tokenizer or the template cannot be used.
    """
    tokenizer = fastest_tokenizer(find_tokenizer(directory, allow_lossy=allow_lossy))
    return ExampleEncoder(tokenizer, directory=directory, template=template[0], template_name=template[1], now=now)


class ExampleEncoder:
    """Encodes examples with a tokenizer and a chat template."""

    def __init__(self, tokenizer: Tokenizer, *, directory: Path, template: str, template_name: str, now: datetime):
        """Make an encoder; `directory` is the tokenizer's, `template` the source of a chat template, "" for none.

        `now` is what a template is told that asks for the date.

        Raises:
          ValueError: the template is not Jinja, or a file of the directory is damaged.
        """
        self.tokenizer = tokenizer
        self._special = dict(tokenizer.special_tokens)
        self._special_ids = frozenset(self._special.values())
        self.bos_id = read_prompt_bos(directory, tokenizer)
        self.variables: dict[str, str] = {}  # that the template has
        self._template = None
        if template:
            self.variables = read_variables(directory, tokenizer, prompt_bos_id=self.bos_id)
            self._template = ChatTemplate(
                template, name=template_name, variables=self.variables, special_tokens=self._special, now=now
            )
        newline, after = tokenizer.encode("\n"), tokenizer.encode("\na")
        # What is put before a completion that would begin with a space if it stood alone, and taken away again.
        adds_space = after[: len(newline)] == newline and after[len(newline) :] != tokenizer.encode("a")
        self._newline = newline if adds_space else []

    def encode(self, example: Example) -> EncodedExample:
        """Return the ids of an example.

        Raises:
          ValueError: the template refuses it, there is none, or nothing of it is trained.
        """
        found = self._pair(example) if isinstance(example, Pair) else self._conversation(example)
        found.is_trained[:1] = False
        if not found.is_trained.any():
            raise ValueError("by the chat template nothing of it is the assistant's, so there is nothing to train on")
        return found

    def is_ended(self, encoded: EncodedExample) -> bool:
        """Return whether what is trained ends with a special token, by which a model learns where to stop."""
        return int(encoded.ids[np.flatnonzero(encoded.is_trained)[-1]]) in self._special_ids

    def names_special_token(self, example: Example) -> bool:
        """Return whether a text of an example has the name of a special token, which then stands for its id."""
        texts = (
            (example.prompt, example.completion)
            if isinstance(example, Pair)
            else [content for message in example.messages if isinstance(content := message.get("content"), str)]
        )
        return any(name in text for text in texts for name in self._special)

    def num_trained_bytes(self, encoded: EncodedExample) -> int:
        """Return the UTF-8 bytes of the text that is trained; special tokens have none."""
        return len(self.tokenizer.decode(encoded.ids[encoded.is_trained].tolist()).encode())

    def _pair(self, pair: Pair) -> EncodedExample:
        prompt = prompt_ids(pair.prompt, tokenizer=self.tokenizer, bos_id=self.bos_id)
        completion = self._encode_after(pair.completion)
        if completion[-1:] != [self.tokenizer.eos_id]:
            completion.append(self.tokenizer.eos_id)
        is_trained = np.arange(len(prompt) + len(completion)) >= len(prompt)
        return EncodedExample(ids=np.array(prompt + completion), is_trained=is_trained)

    def _encode_after(self, text: str) -> list[int]:
        """Return the ids of a text that stands after another one."""
        if self._newline:
            ids = self.tokenizer.encode_prompt(f"\n{text}")
            if ids[: len(self._newline)] == self._newline:
                return ids[len(self._newline) :]
        return self.tokenizer.encode_prompt(text)

    def _conversation(self, conversation: Conversation) -> EncodedExample:
        if self._template is None:
            raise ValueError(
                "it has messages, and the tokenizer's directory has no chat template, by which they become a text: "
                f"give --template, a file or one of {', '.join(NAMED_TEMPLATES)}"
            )
        chat = self._template.render(conversation.messages, tools=conversation.tools)
        ids, offsets = self.tokenizer.encode_prompt_with_offsets(chat.text)
        is_trained = np.zeros(len(ids), bool)
        begins, ends = np.array(offsets, np.int64).reshape(-1, 2).T
        for first, last in chat.spans:
            is_trained |= (begins < last) & (ends > first)
        return EncodedExample(ids=np.array(ids, np.int64), is_trained=is_trained)
