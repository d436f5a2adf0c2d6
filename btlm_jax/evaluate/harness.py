"""Models of any form as models of EleutherAI's lm-evaluation-harness: its tasks' requests, answered here.

The harness makes requests of three kinds out of a task's documents and turns the answers into scores. An answer is
what its own `hf` model gives of the model's export: the same ids, the same prefix of a text without context, the same
windows of long texts, the same cut at the left. Of the package lm_eval this needs neither PyTorch nor transformers.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import lm_eval.utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from btlm_jax import notices
from btlm_jax.decode.sampling import Sampling
from btlm_jax.display.progress import print_error_line
from btlm_jax.evaluate.checkpoint import MODEL_DTYPE, opened_checkpoint
from btlm_jax.evaluate.results import Work
from btlm_jax.evaluate.scorer import Row
from btlm_jax.evaluate.shared_prefix import PrefixScorer
from btlm_jax.evaluate.texts import Job, TextWriter, load_to_generate
from btlm_jax.generate.loading import GenerationModel
from btlm_jax.kernels.tiles import Int4Tiles
from btlm_jax.kernels.weights import Weights
from btlm_jax.tokenizers.special_tokens import client_tokens, id_of
from btlm_jax.tokenizers.tokenizer import Tokenizer

MODEL_NAME = "btlm"  # of --model
DEFAULT_BATCH_TOKENS, DEFAULT_BATCH_SIZE = 2048, 16
MODEL_ARGS = {  # of --model_args, with their defaults
    "checkpoint": "", "pretrained": "", "int4": False, "dtype": MODEL_DTYPE, "max_length": 0, "seed": 0,
    "batch_tokens": DEFAULT_BATCH_TOKENS,
}  # fmt: skip
_NOT_OURS = {"tokenizer", "trust_remote_code"}  # for tasks, and for its own models
MAX_NEW_TOKENS = 256  # of a request that does not say; the harness's default
# What requests say of sampling, by its name in transformers, and its value that changes nothing.
_SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
_GREEDY = {**_SAMPLING, "temperature": 0.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessSettings:
    """How requests are answered. Raises ValueError for what cannot be."""

    batch_tokens: int  # scored at a time
    batch_size: int  # texts generated at a time
    max_length: int  # of context and continuation, in tokens; 0: the length that the model was trained at
    seed: int  # of sampled texts

    def __post_init__(self):
        for name, least in (("batch_tokens", 1), ("batch_size", 1), ("max_length", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be {least} or more")


class BtlmLM(TemplateLM):
    """Answers the harness's requests with a model of any form."""

    def __init__(self, model: GenerationModel, *, name: str, settings: HarnessSettings):
        """`name` is what results call the model.

        Raises:
          ValueError: the model has no tokenizer.
        """
        super().__init__()
        if model.tokenizer is None:
            raise ValueError(f"{name} holds no tokenizer, which tasks of text need; put its files beside the weights")
        self.model, self.name, self.settings = model, name, settings
        self.model_tokenizer: Tokenizer = model.tokenizer
        self._network = model.metadata.network()
        self._scorer = PrefixScorer(self._network, model.params, model.mesh, batch_tokens=settings.batch_tokens)
        self.writer = TextWriter(model, batch_size=settings.batch_size, seed=settings.seed)
        self._work: Work | None = None  # where answers are kept
        self._sizes: list[int] = []  # of the requests there so far
        self.num_cut = 0  # contexts whose beginning is left out, since answers are kept
        self.max_length = settings.max_length or model.metadata.max_length
        self._ids_of = functools.lru_cache(maxsize=1 << 12)(self._encode)  # a context comes with each of its choices

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> BtlmLM:
        """Load what the harness's own command line says in --model_args, --batch_size and --device.

        Raises:
          ValueError: an argument is not known, or its value is refused.
        """
        given = {**MODEL_ARGS, **arg_dict}
        unknown = sorted(given.keys() - MODEL_ARGS.keys() - _NOT_OURS)
        if unknown:
            raise ValueError(f"model_args has {', '.join(unknown)}; known are {', '.join(MODEL_ARGS)}")
        name = str(given["checkpoint"] or given["pretrained"])
        if not name:
            raise ValueError("model_args lacks checkpoint=MODEL: a run, a model's directory or a URL of one")
        for key, default in MODEL_ARGS.items():
            if type(given[key]) is not type(default) and not isinstance(default, str):
                kind = "True or False" if isinstance(default, bool) else "a whole number"
                raise ValueError(f"model_args has {key}={given[key]}; it must be {kind}")
        more = additional_config or {}
        _check_device(more.get("device"))
        batch_size = str(more.get("batch_size") or "auto").partition(":")[0]
        settings = HarnessSettings(
            batch_tokens=int(given["batch_tokens"]), max_length=int(given["max_length"]), seed=int(given["seed"]),
            batch_size=DEFAULT_BATCH_SIZE if batch_size in ("auto", "1") else int(batch_size),
        )  # fmt: skip
        stack = contextlib.ExitStack()  # what was fetched from a URL is deleted when the process ends
        atexit.register(stack.close)
        checkpoint = stack.enter_context(opened_checkpoint(name, log=print_error_line))
        model = load_to_generate(checkpoint, dtype=str(given["dtype"]), as_int4=bool(given["int4"]))
        return cls(model, name=name, settings=settings)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> BtlmLM:
        """Do what `create_from_arg_obj` does with arguments in one text."""
        return cls.create_from_arg_obj(lm_eval.utils.simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.model.metadata.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id in front of a text without context: the bos_token of the model's export."""
        return _bos_id(self.model, self.model_tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids that transformers makes of the text from the model's export."""
        del kwargs
        return list(self._ids_of(string, add_special_tokens))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log p, is greedy) of each request's continuation after its context.

        Raises:
          ValueError: a continuation is empty, or longer than the model's length.
          FloatingPointError: a log p is not finite.
        """
        del disable_tqdm
        for request in requests:
            if cast(tuple[str, str], request.args)[1] == "":
                raise ValueError(f"{_place_of(request)}: the text to score is empty; mend the document or the task")
        self._requests = requests
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return log p of each request's text: every token once, in windows of the model's length.

        Raises:
          FloatingPointError: a log p is not finite.
        """
        del disable_tqdm
        windows = [list(self._windows(request.args[0])) for request in requests]
        if num_empty := sum(not rows for rows in windows):
            notices.report("text-empty", f"{num_empty:,} texts to score are empty: log p of each is 0", count=num_empty)

        def answer(waiting: Sequence[int]) -> Iterator[tuple[int, float]]:
            yield from ((number, 0.0) for number in waiting if not windows[number])
            owners = [number for number in waiting for _ in windows[number]]
            totals, missing = dict.fromkeys(waiting, 0.0), collections.Counter(owners)
            for index, scores in self._scorer.score([row for number in waiting for row in windows[number]]):
                number = owners[index]
                totals[number] += float(scores.log_p_T.sum())
                missing[number] -= 1
                if not missing[number]:
                    yield number, _finite(totals[number], requests[number])

        sizes = [sum(len(row.tokens) - row.first for row in rows) for rows in windows]
        return self._answers("loglikelihood_rolling", requests, sizes, answer)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text after each request's context, up to its stop strings.

        Raises:
          ValueError: a request's settings are not known, or leave no room for its context.
        """
        del disable_tqdm
        seen: collections.Counter[int] = collections.Counter()  # requests that are to be sampled several times
        jobs, num_cut = [], 0
        for number, request in enumerate(requests):
            job, is_cut = self._make_job(number, request, sample=seen[id(request)])
            jobs.append(job)
            num_cut += is_cut
            seen[id(request)] += 1
        self._note_cut(num_cut)

        def answer(waiting: Sequence[int]) -> Iterator[tuple[int, str]]:
            yield from self.writer.write([jobs[number] for number in waiting])

        sizes = [len(job.ids) + job.num_tokens for job in jobs]
        return self._answers("generate_until", requests, sizes, answer)

    @contextlib.contextmanager
    def answers_kept(self, work: Work) -> Iterator[None]:
        """Keep the answers of this block, and take from there those that it has already."""
        self._work, self._sizes, self.num_cut = work, [], 0
        try:
            yield
        finally:
            self._work, self._sizes = None, []

    def _answers(
        self, kind: str, requests: Sequence[Instance], sizes: Sequence[int],
        answer: Callable[[Sequence[int]], Iterator[tuple[int, Any]]],
    ) -> list[Any]:  # fmt: skip
        """Return the answers of all requests: those that are kept, and what `answer` yields for the others' numbers."""
        first, work = len(self._sizes), self._work or Work(kind, None)
        self._sizes += sizes
        work.begin(self._sizes, unit_name="tokens")
        found = {number: work.done(first + number) for number in range(len(requests))}
        for number, value in answer([number for number, value in found.items() if value is None]):
            found[number] = value
            work.add(first + number, value)
            self.cache_hook.add_partial(kind, requests[number].args, value)
        if self._work is None:
            work.close()
            self._sizes = []
        return [found[number] for number in range(len(requests))]

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of prompts with a chat template is named by."""
        return self.name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Refuse what the harness asks for with --apply_chat_template.

        Raises:
          ValueError: always.
        """
        raise ValueError(
            "--apply_chat_template is not for this model: leave it out, or convert the model (btlm convert "
            "--format=hf) and give --model hf --model_args pretrained=DIRECTORY"
        )

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes into its results of the model."""
        metadata = self.model.metadata
        is_int4 = isinstance(self.model.params, Weights) and isinstance(self.model.params.down, Int4Tiles)
        return {
            "model_name": self.name,
            "model_dtype": "int4" if is_int4 else metadata.model.dtype,
            "max_length": self.max_length,
            **{f"model_{key}": value for key, value in metadata.notes.items()},
        }

    def _encode(self, text: str, add_special_tokens: bool | None) -> tuple[int, ...]:
        bos_id = self.model.metadata.prompt_bos_id
        ids = tuple(self.model_tokenizer.encode_prompt(text))
        if add_special_tokens is False or bos_id is None or (add_special_tokens is None and ids[:1] == (bos_id,)):
            return ids
        return (bos_id, *ids)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        rows, num_cut = [], 0
        for number, (_, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"{_place_of(self._requests[number])}: a continuation of {len(continuation):,} tokens after "
                    f"{len(context):,}; it must be 1 to {self.max_length:,} tokens, the model's length, after at least "
                    "one"
                )
            tokens = (context + continuation)[-(self.max_length + 1) :]
            num_cut += len(tokens) < len(context) + len(continuation)
            rows.append(Row(tokens=tokens, first=len(tokens) - len(continuation)))
        self._note_cut(num_cut)

        def answer(waiting: Sequence[int]) -> Iterator[tuple[int, tuple[float, bool]]]:
            for index, scores in self._scorer.score([rows[number] for number in waiting]):
                log_p = _finite(float(scores.log_p_T.sum()), self._requests[waiting[index]])
                yield waiting[index], (log_p, bool(scores.is_greedy_T.all()))

        sizes = [len(row.tokens) for row in rows]
        return [
            (log_p, is_greedy) for log_p, is_greedy in self._answers("loglikelihood", self._requests, sizes, answer)
        ]

    def _windows(self, text: str) -> Iterator[Row]:
        windows = lm_eval.utils.get_rolling_token_windows(
            token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
            context_len=1,
        )  # fmt: skip
        for context, continuation in map(lm_eval.utils.make_disjoint_window, windows):
            yield Row(tokens=[*context, *continuation], first=len(context))

    def _make_job(self, number: int, request: Instance, *, sample: int) -> tuple[Job, bool]:
        """Return the text to write for a request, and whether its context had to be cut."""
        context, given = cast(tuple[str, dict[str, Any]], request.args)
        try:
            settings: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), MAX_NEW_TOKENS))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{_place_of(request)}: generation_kwargs={given!r} cannot be used: {error}") from error
        end = self.model_tokenizer.decode([self.eot_token_id]) or _name_of(self.model_tokenizer, self.eot_token_id)
        stops = tuple(handle_stop_sequences(settings.pop("until", None), eos=end))
        num_tokens = int(settings.pop("max_gen_toks"))
        does_sample = bool(settings.pop("do_sample", False))
        known = {name: settings.pop(name) for name in tuple(settings) if name in _SAMPLING}
        if settings:
            raise ValueError(
                f"{_place_of(request)}: generation_kwargs has {', '.join(settings)}; known are until, max_gen_toks, "
                f"do_sample, {', '.join(_SAMPLING)}"
            )
        if not 0 < num_tokens < self.max_length:
            raise ValueError(
                f"{_place_of(request)}: max_gen_toks={num_tokens} leaves no room for a context in the model's length "
                f"of {self.max_length:,}; give a larger max_length, or the task a smaller max_gen_toks"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        kept = ids[-(self.max_length - num_tokens) :]
        only = known if does_sample else {name: known[name] for name in known if name == "repetition_penalty"}
        sampling = Sampling(**{**(_SAMPLING if does_sample else _GREEDY), **only})
        job = Job(
            number=number, ids=kept, stops=stops, num_tokens=num_tokens, sample=sample if does_sample else 0,
            sampling=sampling,
        )  # fmt: skip
        return job, len(kept) < len(ids)

    def _note_cut(self, num_cut: int) -> None:
        self.num_cut += num_cut
        if self._work is None:  # otherwise whoever keeps the answers says it
            report_cut(num_cut, of="", max_length=self.max_length)


register_model(MODEL_NAME)(BtlmLM)


def report_cut(num_cut: int, *, of: str, max_length: int) -> None:
    """Say how many contexts of a task were cut, if any were."""
    if num_cut:
        notices.report(
            "context-cut",
            f"{of}{num_cut:,} contexts are longer than the model's length of {max_length:,} tokens allows: their "
            "beginnings are left out",
            count=num_cut,
        )


def _check_device(device: object) -> None:
    """Check that --device names what JAX computes on; the harness's default is cuda:0."""
    if device not in (None, "cuda:0") and str(device).partition(":")[0] not in (jax.default_backend(), "cuda"):
        raise ValueError(
            f"device={device} is not what JAX computes on here, {jax.default_backend()}: leave it out, and choose with "
            "the environment variable JAX_PLATFORMS"
        )


def _finite(log_p: float, request: Instance) -> float:
    if not math.isfinite(log_p):
        raise FloatingPointError(f"{_place_of(request)}: log p is {log_p}: the model's weights are damaged")
    return log_p


def _place_of(request: Instance) -> str:
    return f"task {request.task_name}, document {request.doc_id}"


def _bos_id(model: GenerationModel, tokenizer: Tokenizer) -> int:
    """Return the id of what tokenizer_config.json of the model's export calls bos_token."""
    metadata = model.metadata
    config, prompt_bos_id = metadata.clients.tokenizer_config, metadata.prompt_bos_id
    bos_id = id_of(client_tokens(tokenizer, config, prompt_bos_id=prompt_bos_id)["bos_token"], tokenizer)
    return metadata.eos_id if bos_id is None else bos_id


def _name_of(tokenizer: Tokenizer, number: int) -> str | None:
    return next((name for name, at in tokenizer.special_tokens.items() if at == number), None)
