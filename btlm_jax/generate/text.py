"""A model and its tokenizer continue texts: one as it is made, at the terminal, or many, to the terminal or a file."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from btlm_jax.decode.batch import Batch, FinishReason, Timings
from btlm_jax.decode.decoder import CACHE_DTYPES
from btlm_jax.decode.sampling import Sampling, make_generator
from btlm_jax.display.progress import RateLimit, StatusLine
from btlm_jax.display.terminal import printable
from btlm_jax.generate.loading import load_for_generation
from btlm_jax.generate.prompts import Prompt, check_text
from btlm_jax.hub.native import NativeModel
from btlm_jax.kernels.tiles import Int4Tiles
from btlm_jax.kernels.weights import Weights
from btlm_jax.model import Btlm
from btlm_jax.storage.files import write_atomically
from btlm_jax.tokenizers.detokenize import StreamDecoder

MODEL_DTYPE = "model"  # the cache is in what the model computes in, and in int8 where its weights have 4 bits
DROPPED_ATTENTION_WARNING = 1e-6  # of attention, at which a user is warned; float32 rounds at 6e-8
PROGRESS_SECONDS = 2.0  # progress is shown no more often


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How prompts are to be continued."""

    num_tokens: int  # at most, of each text
    num_samples: int  # of each prompt
    batch_size: int
    stops: tuple[str, ...]
    sampling: Sampling
    seed: int
    cache_dtype: str

    def __post_init__(self):
        for name, least in (("num_tokens", 1), ("num_samples", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be {least} or more")
        if "" in self.stops:
            raise ValueError("stop='' is not allowed; a stop string needs a character, for a newline $'\\n' in bash")
        for stop in self.stops:
            check_text(stop, name=f"stop={stop!a}")
        if self.cache_dtype not in (MODEL_DTYPE, *CACHE_DTYPES):
            allowed = ", ".join((MODEL_DTYPE, *CACHE_DTYPES))
            raise ValueError(f"cache_dtype={self.cache_dtype} is not allowed; it must be one of {allowed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """A text that was made; the stop string is not in it, its tokens are counted."""

    prompt: Prompt
    sample: int
    text: str
    num_tokens: int
    ended_by: FinishReason
    stop_string: str

    def to_json(self) -> str:
        """Return it as one line."""
        row = {name: getattr(self, name) for name in ("sample", "text", "num_tokens", "ended_by")}
        stop = {"stop_string": self.stop_string} if self.stop_string else {}
        return json.dumps({"prompt": self.prompt.text} | row | stop | self.prompt.beside, ensure_ascii=False)


def load_with_tokenizer(directory: Path, *, as_int4: bool) -> NativeModel:
    """Load a model with its tokenizer: a run's last checkpoint, a model directory, a Hugging Face directory.

    Raises:
      FileNotFoundError: there is no model or no tokenizer.
      ValueError: one of them is damaged.
    """
    native = load_for_generation(directory, as_int4=as_int4)
    if native.tokenizer is None:
        raise FileNotFoundError(f"{directory} holds no tokenizer, which text needs; put its files beside the weights")
    return native


def stream_completion(native: NativeModel, prompt: Prompt, *, how: GenerationConfig) -> None:
    """Print a prompt and its first sample as it is made; the speed goes to the error stream."""
    speed = Timings()
    (wanted,) = _requests(native, prompt, num_samples=1)
    _note_length(native, [wanted], how)
    batch = _batch(native, native.metadata.network(), [wanted], how, num_rows=1, speed=speed)
    print(prompt.text, end="", flush=True)
    text = wanted.growing_text(native, how)
    for _, piece in _pieces(batch, [text]):
        print(printable(piece), end="", flush=True)
    print()
    _report(speed, num_tokens=text.num_tokens, lost=batch.dropped_attention_bound)


def print_completions(native: NativeModel, prompts: Sequence[Prompt], *, how: GenerationConfig) -> None:
    """Print every sample of every prompt, in order; progress and the speed go to the error stream."""
    for number, made in enumerate(_complete_all(native, prompts, how)):
        title = f"prompt {number // how.num_samples + 1}, sample {made.sample + 1}"
        print(f"--- {title}: {made.num_tokens:,} tokens, ended by {_ending(made)}")
        print(made.prompt.text + printable(made.text), flush=True)


def save_completions(native: NativeModel, prompts: Sequence[Prompt], *, how: GenerationConfig, path: Path) -> None:
    """Write every sample of every prompt as JSON lines, in order, at the end and at once."""
    lines = [made.to_json() + "\n" for made in _complete_all(native, prompts, how)]
    write_atomically(path, "".join(lines))
    print(f"wrote {len(lines):,} texts to {path}", file=sys.stderr)


def check_output(path: Path) -> None:
    """Check that a file can be written there, before hours are spent on what goes into it.

    Raises:
      OSError: it cannot.
    """
    if path.is_dir():
        raise IsADirectoryError(f"output={path} is a directory; give the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"output={path} cannot be written: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"output={path} cannot be written: directory {path.parent} is read-only")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
    """A sample of a prompt that is to be made."""

    prompt: Prompt
    sample: int
    ids: list[int]

    def growing_text(self, native: NativeModel, how: GenerationConfig) -> StreamDecoder:
        return StreamDecoder(native.tokenizer, begins_text=not self.prompt.text, stops=how.stops)


def _requests(native: NativeModel, prompt: Prompt, *, num_samples: int) -> list[_Request]:
    ids = [native.tokenizer.eos_id, *native.tokenizer.encode(prompt.text)]  # a document begins after another's end
    return [_Request(prompt=prompt, sample=sample, ids=ids) for sample in range(num_samples)]


def _complete_all(native: NativeModel, prompts: Sequence[Prompt], how: GenerationConfig) -> Iterator[Completion]:
    """Yield every continuation in order. Batches are of prompts of similar length, the longest first."""
    all_wanted = [one for prompt in prompts for one in _requests(native, prompt, num_samples=how.num_samples)]
    _note_length(native, all_wanted, how)
    order = sorted(range(len(all_wanted)), key=lambda index: -len(all_wanted[index].ids))
    num_rows, model = min(how.batch_size, len(order)), native.metadata.network()
    done: dict[int, Completion] = {}
    speed, next_index, lost = Timings(), 0, 0.0
    progress = _Progress(num_texts=len(order), most_tokens=how.num_tokens, speed=speed)
    for start in range(0, len(order), num_rows):
        indices = order[start : start + num_rows]
        wanted = [all_wanted[index] for index in indices]
        batch = _batch(native, model, wanted, how, num_rows=num_rows, speed=speed)
        growing = [one.growing_text(native, how) for one in wanted]
        shown: list[list[str]] = [[] for _ in wanted]
        for row, piece in _pieces(batch, growing):
            shown[row].append(piece)
            progress.show(growing, going=batch.active_rows)
        for row, index in enumerate(indices):
            done[index] = Completion(
                prompt=wanted[row].prompt,
                sample=wanted[row].sample,
                text="".join(shown[row]),
                num_tokens=growing[row].num_tokens,
                ended_by=batch.finish_reasons[row],
                stop_string=growing[row].stop,
            )
        progress.finish_batch(growing)
        lost = max(lost, batch.dropped_attention_bound)
        while next_index in done:
            yield done[next_index]
            next_index += 1
    _report(speed, num_tokens=progress.num_tokens, lost=lost)


def _batch(
    native: NativeModel,
    model: Btlm,
    wanted: Sequence[_Request],
    how: GenerationConfig,
    *,
    num_rows: int,
    speed: Timings,
) -> Batch:
    return Batch(
        model,
        native.params,
        native.mesh,
        prompts=[one.ids for one in wanted],
        generators=[make_generator(how.seed, sample=one.sample, prompt=one.ids) for one in wanted],
        num_rows=num_rows,
        num_tokens=how.num_tokens,
        sampling=how.sampling,
        stop_id=native.tokenizer.eos_id,
        cache_dtype=_cache_dtype(native) if how.cache_dtype == MODEL_DTYPE else how.cache_dtype,
        timings=speed,
    )


def _cache_dtype(native: NativeModel) -> str:
    has_4_bits = isinstance(native.params, Weights) and isinstance(native.params.down, Int4Tiles)
    return "int8" if has_4_bits else native.metadata.model.dtype


def _pieces(batch: Batch, growing: Sequence[StreamDecoder]) -> Iterator[tuple[int, str]]:
    """Yield (row, text that may now be shown) until every row has ended."""

    def shown(row: int, piece: str) -> tuple[int, str]:
        if growing[row].stop:
            batch.finish(row, FinishReason.STOP_STRING)
        return row, piece

    while batch.active_rows:
        for row, token in batch.step().items():
            yield shown(row, growing[row].push(token))
    for row, text in enumerate(growing):
        yield shown(row, text.finish())


class _Progress:
    """A line on the error stream every few seconds; on a terminal over the last one."""

    def __init__(self, *, num_texts: int, most_tokens: int, speed: Timings):
        self._num_texts, self._most_tokens, self._speed = num_texts, most_tokens, speed
        self._start = time.monotonic()
        self._line, self._rate_limit = StatusLine(sys.stderr), RateLimit(PROGRESS_SECONDS, is_due_at_start=False)
        self._num_before = 0  # texts of the batches before, and their tokens
        self.num_tokens = 0

    def show(self, in_work: Sequence[StreamDecoder], *, going: set[int]) -> None:
        """Say how far the batch in work has come, if it is time."""
        if not self._rate_limit.is_due():
            return
        self._rate_limit.restart()
        num_done = self._num_before + len(in_work) - len(going)
        num_tokens = self.num_tokens + sum(text.num_tokens for text in in_work)
        rate = num_tokens / max(time.monotonic() - self._start - self._speed.compile_seconds, 1e-9)
        left = (self._num_texts - num_done) * self._most_tokens - sum(in_work[row].num_tokens for row in going)
        minutes, seconds = divmod(int(left / rate), 60)
        self._line.show(
            f"{num_done:,} of {self._num_texts:,} texts, {num_tokens:,} tokens, {rate:,.1f} tokens/s, "
            f"ETA at most {minutes}:{seconds:02}"
        )

    def finish_batch(self, finished: Sequence[StreamDecoder]) -> None:
        """Count a batch as done, and leave the terminal's line to what is printed next."""
        self._num_before += len(finished)
        self.num_tokens += sum(text.num_tokens for text in finished)
        self._line.clear()


def _ending(made: Completion) -> str:
    return f"{made.ended_by} {made.stop_string!r}" if made.stop_string else str(made.ended_by)


def _note_length(native: NativeModel, wanted: Sequence[_Request], how: GenerationConfig) -> None:
    longest, trained = max(len(one.ids) for one in wanted) + how.num_tokens, native.metadata.max_length
    if longest > trained:
        print(f"note: up to {longest:,} tokens, past the {trained:,} this model was trained at", file=sys.stderr)


def _report(speed: Timings, *, num_tokens: int, lost: float) -> None:
    """Print where the time went, see Timings for what is in no rate; and what the cache may have lost."""
    if lost > DROPPED_ATTENTION_WARNING:
        print(
            f"warning: up to {min(lost, 1.0):.1e} of a head's attention may have fallen on keys outside its window of "
            "the cache, which is made for a smaller spread of scores; the text may differ from a whole forward pass's",
            file=sys.stderr,
        )
    prefill = speed.prefill_tokens / max(speed.prefill_seconds, 1e-9)
    decode = speed.decode_tokens / max(speed.decode_seconds, 1e-9)
    print(
        f"{num_tokens:,} new tokens\n"
        f"  compile  {speed.compile_seconds:.2f} s: the first call of each shape; in neither rate below\n"
        f"  prefill  {speed.prefill_tokens:,} prompt tokens in {speed.prefill_seconds:.2f} s: {prefill:,.1f} tokens/s\n"
        f"  decode   {speed.decode_tokens:,} new tokens in {speed.decode_seconds:.2f} s: {decode:,.1f} tokens/s",
        file=sys.stderr,
    )
