"""Texts that a model writes after prompts of ids: in batches of one kind, each up to its stop strings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax

from btlm_jax import notices
from btlm_jax.decode.batch import Batch, FinishReason, Timings
from btlm_jax.decode.sampling import Sampling, make_generator
from btlm_jax.evaluate.checkpoint import MODEL_DTYPE, Checkpoint, check_int4_dtype
from btlm_jax.evaluate.processes import wait_for_halving
from btlm_jax.evaluate.scorer import DroppedAttention
from btlm_jax.generate.loading import GenerationModel, float_weights, load_for_generation
from btlm_jax.hub.given_model import NATIVE, RUN, placed_params
from btlm_jax.hub.native import NativeModel, one_device_mesh, split_average
from btlm_jax.hub.source import HuggingFaceSource, NativeSource, published_metadata
from btlm_jax.kernels.build import has_kernels
from btlm_jax.kernels.weights import Weights
from btlm_jax.tokenizers.detokenize import stop_names
from btlm_jax.train.checkpoint import CheckpointReader


def load_to_generate(checkpoint: Checkpoint, *, dtype: str, as_int4: bool) -> GenerationModel:
    """Load a model with its weights in the layout that is fastest for prompts here: kernels' tiles, or a mesh.

    Raises:
      ValueError: it has 4 bits already, or they are asked for of a checkpoint that is not a run's last, in several
        processes, or with another dtype than theirs.
    """
    given, has_others = checkpoint.given, jax.process_count() > 1
    if given is None or as_int4:
        checkpoint.check_one_process()
        check_int4_dtype(dtype)
        if given is not None and given.form == RUN and given.step != _last_step(checkpoint):
            raise ValueError(f"{checkpoint.name} is not the run's last checkpoint: convert it to 4 bits first")
        return load_for_generation(checkpoint.directory, as_int4=as_int4)
    metadata = checkpoint.metadata
    if dtype != MODEL_DTYPE:
        metadata = dataclasses.replace(metadata, model=dataclasses.replace(metadata.model, dtype=dtype))
    has_norms = metadata.model.qk_norm != "none"
    if has_norms and has_kernels() and not has_others:
        text = f"{checkpoint.name} decodes without the CPU kernels, slower: they have no model.qk_norm"
        notices.report("without-kernels", text)
    if has_norms or not has_kernels() or has_others:
        params, mesh = checkpoint.load()
        return GenerationModel(metadata=metadata, params=params, mesh=mesh, tokenizer=checkpoint.tokenizer)
    mesh = one_device_mesh()
    if given.form in (RUN, NATIVE):
        native = NativeModel(
            metadata=metadata, params=placed_params(given, mesh), mesh=mesh, tokenizer=checkpoint.tokenizer
        )
        source = NativeSource(native)
    else:
        source = HuggingFaceSource(checkpoint.directory)
    weights = float_weights(source.config, source.tensors, dtype=metadata.model.dtype)
    published = published_metadata(source)  # whose tensors contain the residual multiplier
    published = dataclasses.replace(published, model=dataclasses.replace(published.model, dtype=metadata.model.dtype))
    return GenerationModel(metadata=published, params=weights, mesh=mesh, tokenizer=checkpoint.tokenizer)


def _last_step(checkpoint: Checkpoint) -> int:
    return CheckpointReader(split_average(checkpoint.directory)[0]).steps()[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A text to write."""

    number: int  # which it is, for the caller
    ids: Sequence[int]  # of the prompt, at least one
    stops: tuple[str, ...]  # the text ends before the first of them
    num_tokens: int  # at most
    sample: int  # of equal prompts, which this is
    sampling: Sampling


class TextWriter:
    """Writes texts with a model that has a tokenizer; out of memory halves the batch."""

    def __init__(self, model: GenerationModel, *, batch_size: int, seed: int):
        assert model.tokenizer is not None
        self._model, self._tokenizer, self._network = model, model.tokenizer, model.metadata.network()
        self.batch_size, self._seed = batch_size, seed
        self._note_dropped = DroppedAttention().note

    def write(self, jobs: Sequence[Job]) -> Iterator[tuple[int, str]]:
        """Yield (job's number, its text), a batch at a time, long prompts first.

        Raises:
          MemoryError: a single text is too much.
        """
        kinds: dict[tuple[Sampling, int], list[Job]] = {}
        for job in sorted(jobs, key=lambda job: -len(job.ids)):
            kinds.setdefault((job.sampling, job.num_tokens), []).append(job)
        for waiting in kinds.values():
            while waiting:
                batch = waiting[: self.batch_size]
                try:
                    texts = self._write_batch(batch)
                except (MemoryError, jax.errors.JaxRuntimeError) as error:
                    self._halve(error, num_rows=len(batch))
                    continue
                waiting = waiting[len(batch) :]
                yield from zip((job.number for job in batch), texts, strict=True)

    def _halve(self, error: Exception, *, num_rows: int) -> None:
        """Halve the batch after an error of memory; raise any other."""
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise error
        if num_rows == 1:
            raise MemoryError("a single text is too long for the memory; write shorter ones") from error
        wait_for_halving()
        self.batch_size = max(1, num_rows // 2)
        notices.report("batch-halved", f"out of memory with {num_rows:,} texts: {self.batch_size:,} at a time")

    def _write_batch(self, jobs: Sequence[Job]) -> list[str]:
        model = self._model
        batch = Batch(
            self._network, model.params, model.mesh, prompts=[job.ids for job in jobs],
            generators=[make_generator(self._seed, sample=job.sample, prompt=job.ids) for job in jobs],
            num_rows=len(jobs), num_tokens=jobs[0].num_tokens, sampling=jobs[0].sampling,
            num_ids=self._tokenizer.vocab_size, stop_id=model.metadata.eos_id,
            cache_dtype="float32" if isinstance(model.params, Weights) else model.metadata.model.dtype,
            timings=Timings(),
        )  # fmt: skip
        ids: list[list[int]] = [[] for _ in jobs]
        texts = [""] * len(jobs)
        names = [stop_names(self._tokenizer, job.stops) for job in jobs]
        while batch.active_rows:
            for row, token in batch.step().items():
                if token in names[row]:  # it has no text in which it could be found
                    batch.finish(row, FinishReason.STOP_STRING)
                    continue
                ids[row].append(token)
                texts[row] = self._tokenizer.decode(ids[row])
                if row in batch.active_rows and any(stop and stop in texts[row] for stop in jobs[row].stops):
                    batch.finish(row, FinishReason.STOP_STRING)
        self._note_dropped(batch.dropped_attention_bound)
        return [_before_stop(text, job.stops) for text, job in zip(texts, jobs, strict=True)]


def _before_stop(text: str, stops: Sequence[str]) -> str:
    """Return what stands before the stop strings, looked for one after the other, as lm-evaluation-harness does."""
    for stop in filter(None, stops):
        text = text.partition(stop)[0]
    return text
