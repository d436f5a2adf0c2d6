"""Complete texts with a model and its tokenizer: one prompt streamed to the terminal, or many in batches."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from btlm_jax import notices
from btlm_jax.decode.batch import Batch, FinishReason, Timings
from btlm_jax.decode.cpu_cache import DROPPED_ATTENTION
from btlm_jax.decode.decoder import CACHE_DTYPES
from btlm_jax.decode.sampling import Sampling, make_generator
from btlm_jax.display.progress import RateLimit, StatusLine, minutes_and_seconds, printable
from btlm_jax.generate.loading import GenerationModel, load_for_generation
from btlm_jax.generate.output import TextsFile
from btlm_jax.generate.prompts import PROMPT_KEY, Prompt, check_text
from btlm_jax.hub.native import MODEL_FILE, is_model_directory, is_run
from btlm_jax.hub.source import is_hugging_face
from btlm_jax.kernels.tiles import Int4Tiles
from btlm_jax.kernels.weights import Weights
from btlm_jax.model import Btlm
from btlm_jax.storage.files import read_json_object
from btlm_jax.tokenizers.detokenize import StreamDecoder
from btlm_jax.tokenizers.prompt_bos import prompt_ids
from btlm_jax.tokenizers.tokenizer import Tokenizer, has_tokenizer

MODEL_DTYPE = "model"  # a cache in the dtype that the model computes in; int8 for 4-bit weights
BOS_OF_MODEL, NO_BOS, EOS_AS_BOS = "model", "none", "eos"  # what stands in front of a prompt; or an id
_MOST_SAMPLES = 1_000_000
_VALUES_OF_AN_ARRAY = 1000  # at least half as many are hashed to tell models apart
PROGRESS_SECONDS = 2.0  # progress is shown at most this often


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How prompts are completed. Raises ValueError for what cannot be."""

    num_tokens: int  # at most, per text
    num_samples: int  # per prompt
    batch_size: int
    stops: tuple[str, ...]
    sampling: Sampling
    seed: int
    cache_dtype: str  # MODEL_DTYPE or one of CACHE_DTYPES
    bos: str  # BOS_OF_MODEL, NO_BOS, EOS_AS_BOS or an id

    def __post_init__(self):
        for name, least in (("num_tokens", 1), ("num_samples", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be {least} or more")
        if self.num_samples > _MOST_SAMPLES:
            raise ValueError(f"num_samples={self.num_samples} is not allowed; it must be {_MOST_SAMPLES:,} or less")
        if "" in self.stops:
            raise ValueError("stop='' is not allowed; a stop string needs a character, for a newline $'\\n' in bash")
        for stop in self.stops:
            check_text(stop, name=f"stop={stop!a}")
        if self.cache_dtype not in (MODEL_DTYPE, *CACHE_DTYPES):
            allowed = ", ".join((MODEL_DTYPE, *CACHE_DTYPES))
            raise ValueError(f"cache_dtype={self.cache_dtype} is not allowed; it must be one of {allowed}")
        is_id = self.bos.isascii() and self.bos.isdecimal() and len(self.bos) < 10
        if self.bos not in (BOS_OF_MODEL, NO_BOS, EOS_AS_BOS) and not is_id:
            raise ValueError(
                f"bos={self.bos[:40]} is not allowed; it must be {BOS_OF_MODEL}, {NO_BOS}, {EOS_AS_BOS} or an id's "
                "number"
            )

    def bos_id(self, model: TextModel) -> int | None:
        """Return the id to put in front of every prompt, or None for nothing.

        Raises:
          ValueError: it is none of the vocabulary.
        """
        if self.bos == BOS_OF_MODEL:
            return model.metadata.prompt_bos_id
        if self.bos == NO_BOS:
            return None
        number = model.tokenizer.eos_id if self.bos == EOS_AS_BOS else int(self.bos)
        if number >= model.tokenizer.vocab_size:
            raise ValueError(f"bos={self.bos} is none of the tokenizer's {model.tokenizer.vocab_size:,} ids")
        return number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """The text after a prompt, without the stop string; `num_tokens` includes the stop string's tokens."""

    prompt: Prompt
    sample: int
    text: str
    num_tokens: int
    finish_reason: FinishReason
    stop_string: str  # "" if it did not end by one

    def to_json(self) -> str:
        """Return it as one line of JSON, with the other keys of the prompt's object."""
        row = {
            PROMPT_KEY: self.prompt.text,
            "sample": self.sample,
            "text": self.text,
            "num_tokens": self.num_tokens,
            "ended_by": self.finish_reason,
        }
        stop = {"stop_string": self.stop_string} if self.stop_string else {}
        return json.dumps(row | stop | self.prompt.extra, ensure_ascii=False)

    def __str__(self) -> str:
        stop = f" {self.stop_string!r}" if self.stop_string else ""
        return f"{self.num_tokens:,} tokens, ended by {self.finish_reason}{stop}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextModel(GenerationModel):
    """A model that has a tokenizer."""

    tokenizer: Tokenizer


def load_with_tokenizer(directory: Path, *, as_int4: bool) -> TextModel:
    """Load a model of any form, and its tokenizer.

    Raises:
      FileNotFoundError: there is no model or no tokenizer.
      ValueError: one of them is damaged.
    """
    check_tokenizer(directory)  # before the weights are read
    model = load_for_generation(directory, as_int4=as_int4)
    tokenizer, num_ids = model.tokenizer, model.metadata.model.vocab_size
    assert tokenizer is not None
    if tokenizer.vocab_size < num_ids:
        notices.report(
            "ids-without-token",
            f"the model has {num_ids:,} ids and its tokenizer {tokenizer.vocab_size:,}; the others are never drawn",
            count=num_ids - tokenizer.vocab_size,
        )
    return TextModel(metadata=model.metadata, params=model.params, mesh=model.mesh, tokenizer=tokenizer)


def stream_completion(model: TextModel, prompt: Prompt, *, config: GenerationConfig) -> None:
    """Print a prompt and its first sample, each character once it is certain; timings go to the error stream."""
    timings = Timings()
    requests = _requests(model, [prompt], dataclasses.replace(config, num_samples=1))
    _note_length(model, requests, config)
    batch = _make_batch(model, model.metadata.network(), requests, config, num_rows=1, timings=timings)
    print(prompt.text, end="", flush=True)
    decoder = requests[0].stream_decoder(model, config)
    for _, piece, _ in _stream_pieces(batch, [decoder]):
        print(printable(piece), end="", flush=True)
    print()
    _report(timings, num_tokens=decoder.num_tokens, dropped_attention=batch.dropped_attention_bound)


def print_completions(model: TextModel, prompts: Sequence[Prompt], *, config: GenerationConfig) -> None:
    """Print every sample of every prompt, in order; progress and timings go to the error stream."""
    requests = _requests(model, prompts, config)
    finished: dict[int, Completion] = {}  # whose turn to be printed has not come
    next_number = 0
    for index, completion in _complete_all(model, requests, config, done=()):
        finished[index] = completion
        while next_number in finished:
            first = finished.pop(next_number)
            print(f"--- prompt {next_number // config.num_samples + 1}, sample {first.sample + 1}: {first}")
            print(first.prompt.text + printable(first.text), flush=True)
            next_number += 1


def save_completions(model: TextModel, prompts: Sequence[Prompt], *, config: GenerationConfig, path: Path) -> None:
    """Write every sample of every prompt as JSON lines, in order, each kept as soon as it is complete (output.py).

    The same command goes on after an interruption, with the texts of an uninterrupted one.
    """
    requests = _requests(model, prompts, config)
    settings = {
        "model": _fingerprint(model),
        "prompts": hashlib.sha256(json.dumps([[one.text, one.extra] for one in prompts]).encode()).hexdigest()[:16],
        "bos_id": config.bos_id(model),
        **dataclasses.asdict(config),
    }
    texts = TextsFile(path, settings=settings, num_texts=len(requests))
    if texts.done:
        print(f"going on: {len(texts.done):,} of {len(requests):,} texts are in {texts.partial}", file=sys.stderr)
    else:
        print(f"texts go to {texts.partial} as they are finished, and to {path} at the end", file=sys.stderr)
    try:
        for index, completion in _complete_all(model, requests, config, done=texts.done):
            texts.add(index, completion.to_json())
        texts.finish()
    finally:
        texts.close()
    print(f"wrote {len(requests):,} texts to {path}", file=sys.stderr)


def _fingerprint(model: TextModel) -> str:
    """Return a hash that tells models apart: of the metadata, and of values spread over every array of weights."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(model.metadata), sort_keys=True).encode())
    for leaf in jax.tree.leaves(model.params):
        array = np.asarray(leaf)
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(array.reshape(-1)[:: 1 + array.size // _VALUES_OF_AN_ARRAY].tobytes())
    return digest.hexdigest()[:16]


def check_tokenizer(directory: Path) -> None:
    """Check that a model has a tokenizer, reading neither it nor weights.

    Raises:
      FileNotFoundError: it has none.
      ValueError: what describes the model is damaged.
    """
    missing = f"{directory} holds no tokenizer, which text needs; put its files beside the weights"
    if is_hugging_face(directory):
        if not has_tokenizer(directory):
            raise FileNotFoundError(missing)
    elif is_model_directory(directory) and not is_run(directory):  # its own reader checks what else it says
        if read_json_object(directory / MODEL_FILE).get("tokenizer") is None:
            raise FileNotFoundError(missing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
    """One sample of one prompt, to be generated."""

    prompt: Prompt
    sample: int
    ids: list[int]

    def stream_decoder(self, model: TextModel, config: GenerationConfig) -> StreamDecoder:
        begins_text = not model.tokenizer.decode(self.ids)
        return StreamDecoder(model.tokenizer, begins_text=begins_text, stops=config.stops)


def _requests(model: TextModel, prompts: Sequence[Prompt], config: GenerationConfig) -> list[_Request]:
    special = model.tokenizer.special_tokens
    for stop in config.stops:
        if stop not in special and (name := next((name for name in special if name in stop), "")):
            notices.report(
                "stop-without-text", f"--stop={stop!a}: {name} in it has no text; give --stop={name!a} for it"
            )
    bos_id = config.bos_id(model)
    ids = [prompt_ids(prompt.text, tokenizer=model.tokenizer, bos_id=bos_id) for prompt in prompts]
    return [
        _Request(prompt=prompt, sample=sample, ids=its_ids)
        for prompt, its_ids in zip(prompts, ids, strict=True)
        for sample in range(config.num_samples)
    ]


def _complete_all(
    model: TextModel, requests: Sequence[_Request], config: GenerationConfig, *, done: Collection[int]
) -> Iterator[tuple[int, Completion]]:
    """Yield (index, completion) of every request that is not done, each when it is finished.

    Batches are of prompts of similar length, the longest first. Those that are all done are left out; in others the
    rows that are done are made again, as the rounding of a row's numbers depends on the shape of its batch.
    """
    _note_length(model, requests, config)
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].ids))
    num_rows, network = min(config.batch_size, len(order)), model.metadata.network()
    timings, dropped_attention = Timings(), 0.0
    batches = [order[start : start + num_rows] for start in range(0, len(order), num_rows)]
    batches = [indices for indices in batches if not set(indices) <= set(done)]
    progress = _Progress(num_texts=sum(map(len, batches)), max_tokens=config.num_tokens, timings=timings)
    for indices in batches:
        rows = [requests[index] for index in indices]
        batch = _make_batch(model, network, rows, config, num_rows=num_rows, timings=timings)
        decoders = [request.stream_decoder(model, config) for request in rows]
        pieces: list[list[str]] = [[] for _ in rows]
        for row, piece, is_last in _stream_pieces(batch, decoders):
            pieces[row].append(piece)
            if is_last and indices[row] not in done:
                progress.clear_line()
                yield (
                    indices[row],
                    Completion(
                        prompt=rows[row].prompt,
                        sample=rows[row].sample,
                        text="".join(pieces[row]),
                        num_tokens=decoders[row].num_tokens,
                        finish_reason=batch.finish_reasons[row],
                        stop_string=decoders[row].stop,
                    ),
                )
            progress.show(decoders, active_rows=batch.active_rows)
        progress.finish_batch(decoders)
        dropped_attention = max(dropped_attention, batch.dropped_attention_bound)
    _report(timings, num_tokens=progress.num_tokens, dropped_attention=dropped_attention)


def _make_batch(
    model: TextModel,
    network: Btlm,
    requests: Sequence[_Request],
    config: GenerationConfig,
    *,
    num_rows: int,
    timings: Timings,
) -> Batch:
    return Batch(
        network,
        model.params,
        model.mesh,
        prompts=[request.ids for request in requests],
        generators=[make_generator(config.seed, sample=request.sample, prompt=request.ids) for request in requests],
        num_rows=num_rows,
        num_tokens=config.num_tokens,
        sampling=config.sampling,
        num_ids=model.tokenizer.vocab_size,
        stop_id=model.metadata.eos_id,
        cache_dtype=_model_cache_dtype(model) if config.cache_dtype == MODEL_DTYPE else config.cache_dtype,
        timings=timings,
    )


def _model_cache_dtype(model: TextModel) -> str:
    is_int4 = isinstance(model.params, Weights) and isinstance(model.params.down, Int4Tiles)
    return "int8" if is_int4 else model.metadata.model.dtype


def _stream_pieces(batch: Batch, decoders: Sequence[StreamDecoder]) -> Iterator[tuple[int, str, bool]]:
    """Yield (row, text that is certain now, whether it is the row's last) until every row has ended."""

    def is_stopped(row: int) -> bool:
        if decoders[row].stop:
            batch.finish(row, FinishReason.STOP_STRING)
        return bool(decoders[row].stop)

    while batch.active_rows:
        stepped = sorted(batch.active_rows)
        for row, token in batch.step().items():
            piece = decoders[row].push(token)
            is_stopped(row)
            yield row, piece, False
        for row in stepped:
            if row not in batch.active_rows:
                piece = decoders[row].finish()
                is_stopped(row)
                yield row, piece, True


class _Progress:
    """A line on the error stream every few seconds; on a terminal it replaces the last one."""

    def __init__(self, *, num_texts: int, max_tokens: int, timings: Timings):
        self._num_texts, self._max_tokens, self._timings = num_texts, max_tokens, timings
        self._start = time.monotonic()
        self._line, self._rate_limit = StatusLine(sys.stderr), RateLimit(PROGRESS_SECONDS, is_due_at_start=False)
        self._num_finished = 0  # texts of the finished batches
        self.num_tokens = 0  # of the finished batches

    def show(self, decoders: Sequence[StreamDecoder], *, active_rows: set[int]) -> None:
        """Show the progress of the current batch, if PROGRESS_SECONDS have passed."""
        if not self._rate_limit.is_due():
            return
        self._rate_limit.restart()
        num_done = self._num_finished + len(decoders) - len(active_rows)
        num_tokens = self.num_tokens + sum(decoder.num_tokens for decoder in decoders)
        rate = num_tokens / max(time.monotonic() - self._start - self._timings.compile_seconds, 1e-9)
        max_remaining = (self._num_texts - num_done) * self._max_tokens
        max_remaining -= sum(decoders[row].num_tokens for row in active_rows)
        text = f"{num_done:,} of {self._num_texts:,} texts, {num_tokens:,} tokens, {rate:,.1f} tokens/s"
        if num_tokens:  # a text that ends at once has none
            text += f", ETA at most {minutes_and_seconds(max_remaining / rate)}"
        self._line.show(text)

    def clear_line(self) -> None:
        """Clear the terminal's line for what is printed next."""
        self._line.clear()

    def finish_batch(self, decoders: Sequence[StreamDecoder]) -> None:
        """Count a batch as finished, and clear the terminal's line for what is printed next."""
        self._num_finished += len(decoders)
        self.num_tokens += sum(decoder.num_tokens for decoder in decoders)
        self._line.clear()


def _note_length(model: TextModel, requests: Sequence[_Request], config: GenerationConfig) -> None:
    longest = max(len(request.ids) for request in requests) + config.num_tokens
    trained = model.metadata.max_length
    if longest > trained:
        print(f"note: up to {longest:,} tokens, past the {trained:,} this model was trained at", file=sys.stderr)


def _report(timings: Timings, *, num_tokens: int, dropped_attention: float) -> None:
    """Print the timings, see Timings for what they include, and warn of attention dropped from the cache."""
    if dropped_attention > DROPPED_ATTENTION:
        print(
            f"warning: up to {min(dropped_attention, 1.0):.1e} of a head's attention may have fallen on keys outside "
            "its window of the cache, which is made for a smaller spread of scores; the text may differ from a whole "
            "forward pass's",
            file=sys.stderr,
        )
    prefill = timings.prefill_tokens / max(timings.prefill_seconds, 1e-9)
    decode = timings.decode_tokens / max(timings.decode_seconds, 1e-9)
    print(
        f"{num_tokens:,} new tokens\n"
        f"  compile  {timings.compile_seconds:.2f} s: the first call of each shape; in neither rate below\n"
        f"  prefill  {timings.prefill_tokens:,} prompt tokens in {timings.prefill_seconds:.2f} s: "
        f"{prefill:,.1f} tokens/s\n"
        f"  decode   {timings.decode_tokens:,} new tokens in {timings.decode_seconds:.2f} s: {decode:,.1f} tokens/s",
        file=sys.stderr,
    )
