"""Byte-level BPE as GPT-2's: read from vocab.json and merges.txt or tokenizer.json, or trained. Gives every text back.

A pattern splits a text into words, each word becomes its UTF-8 bytes, each byte is written as a visible character, and
pairs are merged in the order of the merges (https://github.com/openai/gpt-2/blob/master/src/encoder.py).
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from btlm_jax.data.store import TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_INFO_FILE
from btlm_jax.storage.files import check_no_lfs_pointer, parse_json_object, read_json_object
from btlm_jax.tokenizers import MAX_VOCAB_SIZE

# A space or newline between two other characters always starts a word of GPT-2's pattern, and the text before it is
# split as at the end of a text. (What Python counts as white space, the pattern does too.)
GPT2_BOUNDARY = re.compile(r"(?<=\S)[ \n](?=\S)")
KIND = "byte_level_bpe"
STORED_FILE = "tokenizer.json"
VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE = "special_tokens_map.json", "added_tokens.json"
END_OF_TEXT = "<|endoftext|>"
MAX_TRAINED_WORD = 256  # characters
MIN_VOCAB_SIZE = 257  # 256 bytes and the end of text
_GPT2_STEPS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_SPLITTING_STEPS = ("Split", "Digits", "Punctuation")  # others also drop or replace characters


class JsonTokenizer:
    """A tokenizer.json: text to ids and back; no text is encoded as `eos_id` or as another special token."""

    stored_file = STORED_FILE
    boundary: re.Pattern | None = None

    def __init__(self, contents: bytes, *, eos_id: int, check: Callable[[dict, Tokenizer], None]):
        """Read the contents; `check` gets them parsed, and the tokenizer, and raises ValueError for other kinds.

        Raises:
          ValueError: it is damaged, not of the kind, or `eos_id` is not in it.
        """
        self.contents = contents
        self._tokenizer = _read(contents, eos_id=eos_id, check=check)
        self.eos_id = eos_id
        self.eos_token = self.token(eos_id)
        self.vocab_size = self._tokenizer.get_vocab_size()

    @property
    def json(self) -> str:
        """The tokenizer as a tokenizer.json of the installed library, without the parts that it would not use."""
        return self._tokenizer.to_str()

    @property
    def tokens(self) -> list[str]:
        """The tokens by id, as they stand in the vocabulary."""
        return [self.token(number) for number in range(self.vocab_size)]

    @property
    def spare_token(self) -> str:
        """The end of text: this tokenizer has no token for unknown characters."""
        return self.eos_token

    def token_id(self, token: str) -> int | None:
        """Return the id of a token of the vocabulary, or None."""
        return self._tokenizer.token_to_id(token)

    def token(self, number: int) -> str:
        """Return the token of an id, as it stands in the vocabulary."""
        token = self._tokenizer.id_to_token(number)
        assert token is not None, f"{number} is not one of {self._tokenizer.get_vocab_size()} ids"
        return token

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The pairs that are merged, in order."""
        return [(left, right) for left, right in json.loads(self.json)["model"]["merges"]]

    @property
    def special_ids(self) -> list[int]:
        """The ids that no text is encoded as and that decode to nothing."""
        return sorted(token for token, properties in self.added_tokens.items() if properties.special)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    @property
    def special_tokens(self) -> dict[str, int]:
        """The ids that no text is encoded as, by the tokens' names."""
        return {self.token(number): number for number in self.special_ids}

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text in which the name of a special token stands for its id."""
        if not any(name in text for name in map(self.token, self.special_ids)):
            return self.encode(text)
        return self._reading_special_names.encode(text, add_special_tokens=False).ids

    def encode_prompt_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of `encode_prompt`, and of each the (begin, end) of its characters in the text."""
        encoding = self._reading_special_names.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    @functools.cached_property
    def _reading_special_names(self) -> Tokenizer:
        return Tokenizer.from_str(self.json)  # the library does not store encode_special_tokens

    def encode_exactly(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self.encode(text)

    def encode_batch(self, texts: Sequence[str], *, num_threads: int) -> list[list[int]]:
        """Return the ids of each text; on this thread if `num_threads` is 1, else on all threads of the library."""
        if num_threads == 1:
            return [self.encode(text) for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special ids give nothing."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    @property
    def added_tokens(self) -> dict[int, AddedToken]:
        """The tokens beside the model's own, by id; texts are split at those that are not special."""
        return dict(self._tokenizer.get_added_tokens_decoder())


class ByteLevelTokenizer(JsonTokenizer):
    """Byte-level BPE; tokens stand in the vocabulary in the visible characters for bytes."""

    kind = KIND
    text_changes: list[str]  # its parts that change texts, such as a normaliser

    def __init__(self, contents: bytes, *, eos_id: int, allow_lossy: bool = False):
        """Read the contents of a tokenizer.json; one that would change texts only if `allow_lossy`.

        Raises:
          ValueError: it is damaged, not byte-level BPE, would change texts, or `eos_id` is not in it.
        """

        def check(body: dict, tokenizer: Tokenizer) -> None:
            self.text_changes = _check_kind(body, allow_lossy=allow_lossy)
            _check_vocabulary(tokenizer)

        super().__init__(contents, eos_id=eos_id, check=check)
        self.boundary = GPT2_BOUNDARY if self.has_gpt2_rules else None

    @property
    def has_gpt2_pattern(self) -> bool:
        """Whether words are cut by GPT-2's pattern and merged by the merges alone, whatever tokens are added."""
        body = json.loads(self.json)
        steps, normalizer = body["pre_tokenizer"], body["normalizer"]
        return steps == _GPT2_STEPS and normalizer is None and not body["model"]["ignore_merges"]

    @property
    def has_gpt2_rules(self) -> bool:
        """Whether vocab.json and merges.txt describe it fully: GPT-2's pattern, one special token, the end of text."""
        return self.has_gpt2_pattern and len(self.added_tokens) == 1


def train_byte_level(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """Train merges on texts split by GPT-2's pattern; return a tokenizer.json in which END_OF_TEXT is the last id.

    The same texts give the same bytes, whatever their order and the number of threads. Words of more than
    MAX_TRAINED_WORD characters count as several: the time of the library grows with the square of their length.

    Raises:
      ValueError: the vocabulary is too small, or too large for these texts.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size={vocab_size} is too small for byte-level BPE: {MIN_VOCAB_SIZE} or more")
    if vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size={vocab_size} is too large: {MAX_VOCAB_SIZE:,} or less")
    tokenizer = _like_gpt2(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _without_long_words(text)), trainer)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"no tokenizer of {vocab_size:,} tokens can be trained on this text: every word is one token at "
            f"{tokenizer.get_vocab_size():,}; ask for at most that, or give more text"
        )
    return tokenizer.to_str().encode()


def read_byte_level(directory: Path, *, allow_lossy: bool = False) -> ByteLevelTokenizer:
    """Read the tokenizer.json of a Hugging Face directory, or its vocab.json and merges.txt.

    One that would change texts is read only if `allow_lossy`.

    Raises:
      FileNotFoundError: it has neither.
      ValueError: they are damaged, not byte-level BPE, or have no end-of-text token.
    """
    is_stored = (directory / STORED_FILE).is_file()
    path = directory / (STORED_FILE if is_stored else VOCAB_FILE)
    if is_stored:
        check_no_lfs_pointer(path)
    contents = path.read_bytes() if is_stored else _from_vocabulary(directory)
    try:
        with _naming_damage():
            _check_kind(_parse(contents), allow_lossy=allow_lossy)
        return ByteLevelTokenizer(contents, eos_id=find_eos_id(contents, directory), allow_lossy=allow_lossy)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def long_runs(text: str, length: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of runs of more than `length` letters, digits, spaces or other characters.

    Words of GPT-2's pattern are such runs, with one character before them at most. Looks at every `length // 2`th
    character first, so that a text without such runs takes no time.
    """
    step, end = max(length // 2, 1), 0
    for place in range(0, len(text) - step, step):
        if place < end or _class(text[place]) != _class(text[place + step]):
            continue
        kind = _class(text[place])
        begin, stop = place, place + 1
        while begin > end and _class(text[begin - 1]) == kind:
            begin -= 1
        while stop < len(text) and _class(text[stop]) == kind:
            stop += 1
        if stop - begin > length:
            yield begin, stop
            end = stop


def _class(character: str) -> str:
    """Return what GPT-2's pattern takes a character for: "L", "N", a space, or "" for others."""
    if character.isspace():
        return " "
    kind = unicodedata.category(character)[0]
    return kind if kind in "LN" else ""


def _without_long_words(text: str) -> Iterator[str]:
    start = 0
    for begin, end in long_runs(text, MAX_TRAINED_WORD):
        for cut in range(begin + MAX_TRAINED_WORD, end, MAX_TRAINED_WORD):
            yield text[start:cut]
            start = cut
    yield text[start:]


def find_eos_id(contents: bytes, directory: Path) -> int:
    """Return the id of the end-of-text token that a directory's files name for a tokenizer.json, or of END_OF_TEXT.

    Raises:
      ValueError: the files are damaged, or the token is not in the vocabulary.
    """
    body = _parse(contents)
    eos_token = _eos_token(directory)
    with _naming_damage():
        vocabulary, added = body["model"]["vocab"], body.get("added_tokens", [])
        if isinstance(vocabulary, list):  # of Unigram: pairs of a piece and its score, by id
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        ids = {**vocabulary, **{token["content"]: token["id"] for token in added}}
    if eos_token not in ids:
        raise ValueError(
            f"it lacks the end-of-text token {eos_token!r}; name another as eos_token in tokenizer_config.json"
        )
    return ids[eos_token]


@contextlib.contextmanager
def naming_library_errors(name: object) -> Iterator[None]:
    """Turn what the tokenizers library raises for a damaged file into a ValueError; `name` is what it calls the file.

    The library raises nothing narrower than Exception; where its Rust code panics, a BaseException.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"{name} is damaged: {error!r}") from error


@contextlib.contextmanager
def _naming_damage() -> Iterator[None]:
    """Turn what Python raises for parts that are missing or of another type into a ValueError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{STORED_FILE} is damaged or not a tokenizer: {error!r}") from error


def _from_vocabulary(directory: Path) -> bytes:
    """Return vocab.json and merges.txt as the contents of a tokenizer.json."""
    vocab, merges = directory / VOCAB_FILE, directory / MERGES_FILE
    for path in (vocab, merges):
        if not path.is_file():
            raise FileNotFoundError(f"{directory} lacks {path.name}, and has no {STORED_FILE}")
    if (directory / ADDED_TOKENS_FILE).is_file():
        raise ValueError(
            f"{directory} has an {ADDED_TOKENS_FILE} besides {VOCAB_FILE}; save it as a {STORED_FILE} first"
        )
    vocabulary = read_json_object(vocab)
    if not all(type(number) is int and 0 <= number < len(vocabulary) for number in vocabulary.values()):
        raise ValueError(f"{vocab} has an id that is not one of 0 to {len(vocabulary) - 1}")
    with naming_library_errors(f"{vocab}, or {MERGES_FILE},"):
        tokenizer = _like_gpt2(models.BPE.from_file(str(vocab), str(merges)))
    eos_token = _eos_token(directory)
    if tokenizer.token_to_id(eos_token) is not None:
        tokenizer.add_special_tokens([AddedToken(eos_token, special=True, normalized=False)])
    return tokenizer.to_str().encode()


def _like_gpt2(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """Return a directory's tokenizer_config.json, with the tokens of an older special_tokens_map.json; {} for neither.

    The latter counts, and more than the former, where the former has no added_tokens_decoder, as in transformers 5
    (tokenization_utils_base.py, _from_pretrained): before 4.34 tokens that fine-tuning added were only there.

    Raises:
      ValueError: one is damaged.
    """
    paths = (directory / TOKENIZER_CONFIG_FILE, directory / SPECIAL_TOKENS_FILE)
    config, older = (read_json_object(path) if path.is_file() else {} for path in paths)
    if "added_tokens_decoder" not in config:
        config |= {name: _typed(token) for name, token in older.items()}
    is_kept = (directory / TOKENIZER_INFO_FILE).is_file()
    if is_kept and (directory / TEMPLATE_FILE).is_file():
        config.setdefault("bos_token", None)  # runs of before it was kept always were trained without it
    return config


def _typed(value: Any) -> Any:
    """Return a token, or a list of some, with the type by which transformers knows it in a tokenizer_config.json."""
    if isinstance(value, list):
        return [_typed(token) for token in value]
    is_token = isinstance(value, dict) and "content" in value
    return {"__type": "AddedToken", **value, "special": True} if is_token else value


def _eos_token(directory: Path) -> str:
    token = read_tokenizer_config(directory).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and not (isinstance(token, str) and token):
        raise ValueError(f"{directory}: eos_token={token!r} of its files must be a token of the vocabulary")
    return token or END_OF_TEXT


def _parse(contents: bytes) -> dict:
    body = parse_json_object(contents, name=STORED_FILE)
    if not isinstance(body.get("model"), dict):
        raise ValueError(f"{STORED_FILE} is damaged or not a tokenizer: it has no table `model`")
    return body


def _read(contents: bytes, *, eos_id: int, check: Callable[[dict, Tokenizer], None]) -> Tokenizer:
    body = _parse(contents)
    with _naming_damage():
        body |= {"truncation": None, "padding": None, "post_processor": None}  # these would drop or add ids
        if "merges" in body["model"]:
            body["model"] |= {"type": "BPE", "dropout": None}
    with naming_library_errors(STORED_FILE):
        tokenizer = Tokenizer.from_str(json.dumps(body))
    eos_token = tokenizer.id_to_token(eos_id)
    if eos_token is None:
        raise ValueError(f"{STORED_FILE} has no token of id {eos_id}, which was to be the end of a text")
    tokenizer.add_special_tokens([AddedToken(eos_token, special=True, normalized=False)])
    tokenizer.encode_special_tokens = True  # a special token's name in a text is ordinary text
    with _naming_damage():
        check(body, tokenizer)
    return tokenizer


def _check_kind(body: dict, *, allow_lossy: bool) -> list[str]:
    """Check that this is byte-level BPE that gives every text back, or without that if `allow_lossy`.

    Return the parts that change texts. A normaliser to NFC changes no document of a corpus, for `clean` makes them NFC.
    """
    model, normalizer = body["model"], body.get("normalizer")
    kind = model.get("type", "BPE" if "merges" in model else "unknown")
    steps: dict = body.get("pre_tokenizer") or {"type": "none"}
    decoder = (body.get("decoder") or {"type": "none"})["type"]
    *splits, last = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    description = (
        f"{kind} with pre-tokenizer {'+'.join(step['type'] for step in (*splits, last))} and decoder {decoder}"
    )
    if kind != "BPE" or last["type"] != "ByteLevel" or decoder != "ByteLevel":
        raise ValueError(f"{STORED_FILE} is {description}; only byte-level BPE can be read (BPE, ByteLevel, ByteLevel)")
    changes = [step["type"] for step in _normalizers(normalizer) if step["type"] != "NFC"]
    changes += [step["type"] for step in splits if not _only_splits(step)]
    changes += ["add_prefix_space"] if last.get("add_prefix_space", True) else []
    changes += [part for part in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(part)]
    changes += [
        f"strip around {token['content']!r}"
        for token in body.get("added_tokens", [])
        if not token["special"] and (token["lstrip"] or token["rstrip"])
    ]
    if changes and not allow_lossy:
        raise ValueError(
            f"{STORED_FILE} would not give every text back, as it has: {', '.join(changes)}; btlm corpus tokenize "
            "--allow_lossy takes it"
        )
    return changes


def _normalizers(normalizer: dict | None) -> list[dict]:
    """Return the steps of a normaliser."""
    if not normalizer:
        return []
    return normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]


def _only_splits(step: dict) -> bool:
    return step["type"] in _SPLITTING_STEPS and step.get("behavior") != "Removed"


def check_ids(tokenizer: Tokenizer) -> None:
    """Check that the ids of a vocabulary are 0, 1, 2, ...; raise ValueError if not."""
    vocabulary = tokenizer.get_vocab()
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError(f"the ids of {STORED_FILE} are not 0 to {len(vocabulary) - 1}, each once")


def _check_vocabulary(tokenizer: Tokenizer) -> None:
    check_ids(tokenizer)
    vocabulary = tokenizer.get_vocab()
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    missing = alphabet - vocabulary.keys()
    if missing:
        raise ValueError(f"{STORED_FILE} lacks {len(missing)} of the 256 bytes, one of them {min(missing)!r}")
    producible = alphabet | {"".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]}
    for number, token in tokenizer.get_added_tokens_decoder().items():
        is_producible = (
            token.content in producible or number in tokenizer.encode(token.content, add_special_tokens=False).ids
        )
        if token.special and is_producible:
            raise ValueError(f"text can make the special token {token.content!r} (id {number}) of {STORED_FILE}")
