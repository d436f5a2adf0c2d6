"""Three engines that continue a prompt, timed alike: transformers, llama.cpp and ours. Each call is one process's work.

Every function loads a model, warms up, reads a prompt into an empty cache (prefill), where asked extends the cache with
made-up tokens, and then takes the likeliest token again and again (decode). It returns a `Timing`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # llama.cpp's bindings live there

_STATE_MAGIC = 2937339096
_INTERVAL_SECONDS = 0.25
_WARM_PROMPT = 8  # tokens of a first short run
_WARM_TOKENS = 3  # tokens decoded before the clock starts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What an engine is to do."""

    num_prompt: int  # tokens of the prompt, the same random ones for every engine
    num_cached: int  # tokens in the cache before the first decoded one; those after the prompt are made up
    num_decoded: int
    num_prefills: int  # times that the prompt is read
    num_threads: int

    @property
    def num_slots(self) -> int:
        """Return how large a cache that is made in advance has to be."""
        return self.num_cached + _WARM_TOKENS + self.num_decoded

    def prompt(self, vocab_size: int) -> list[int]:
        return np.random.default_rng(0).integers(0, vocab_size, self.num_prompt).tolist()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """Tokens in a row, and how much of the machine's CPU time other processes took meanwhile."""

    num_tokens: int
    seconds: float
    others: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """What an engine took."""

    load_seconds: float
    warm_up_seconds: float  # compilation, and a first short run
    prefill: list[Interval]  # the whole prompt each
    decode: list[Interval]
    peak_bytes: int  # resident, of the process; without what making up a cache took


def run_transformers(directory: Path, work: Work, *, cache: str) -> Timing:
    """Time the exported model in transformers, with SDPA, through its forward pass and a dynamic or a static cache."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

    torch.set_num_threads(work.num_threads)
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, attn_implementation="sdpa").eval()
    load, config = time.perf_counter() - began, model.config

    def make_cache():
        return StaticCache(config, max_cache_len=work.num_slots) if cache == "static" else DynamicCache(config=config)

    def run(ids, past):
        output = model(input_ids=torch.tensor([ids]), past_key_values=past, use_cache=True, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())

    with torch.inference_mode():
        warm_up = _seconds(lambda: run(work.prompt(config.vocab_size)[:_WARM_PROMPT], make_cache()))
        prefill = []
        for _ in range(work.num_prefills):
            past = make_cache()
            stopwatch = Stopwatch()
            token = run(work.prompt(config.vocab_size), past)
            prefill.append(stopwatch.interval(work.num_prompt))
        num_made_up = work.num_cached - work.num_prompt
        if num_made_up:
            made_up = torch.randn(1, config.n_head, num_made_up, config.head_dim).to(model.dtype)
            for layer in range(config.n_layer):
                past.update(made_up, made_up, layer)
        decode = _decode(lambda last: run([last], past), token, work)
    return Timing(load_seconds=load, warm_up_seconds=warm_up, prefill=prefill, decode=decode, peak_bytes=peak_bytes())


def run_llama_cpp(model: Path, work: Work, *, flash_attention: bool, num_prompt_batch: int) -> Timing:
    """Time llama.cpp's own C library: float16 cache, weights in memory of its own (no mapping of the file)."""
    from support import llama_cpp

    library = llama_cpp._library()
    silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    library.llama_log_set(silence, None)
    library.llama_get_logits_ith.restype = ctypes.c_void_p
    model_params = library.llama_model_default_params()
    assert tuple(model_params.words[4:7]) == (-1, 1, -1), "llama_model_params changed"
    model_params.words[6] = 0  # load_mode: none
    began = time.perf_counter()
    loaded = library.llama_model_load_from_file(str(model).encode(), model_params)
    assert loaded, "llama.cpp cannot load the model"
    params = library.llama_context_default_params()
    assert all(params.words[offset] == value for offset, value in llama_cpp._DEFAULTS.items())
    for offset, value in {
        llama_cpp._N_CTX: work.num_slots + -work.num_slots % 256, llama_cpp._N_BATCH: num_prompt_batch,
        llama_cpp._N_UBATCH: num_prompt_batch, llama_cpp._N_THREADS: work.num_threads,
        llama_cpp._N_THREADS_BATCH: work.num_threads, llama_cpp._FLASH_ATTENTION: int(flash_attention),
    }.items():  # fmt: skip
        params.words[offset] = value
    context = library.llama_init_from_model(loaded, params)
    assert context, "llama.cpp cannot make a context"
    load = time.perf_counter() - began
    memory = ctypes.c_void_p(library.llama_get_memory(context))
    V = library.llama_vocab_n_tokens(library.llama_model_get_vocab(loaded))
    batch = library.llama_batch_init(num_prompt_batch, 0, 1)

    def run(ids, position):
        for start in range(0, len(ids), num_prompt_batch):
            piece = ids[start : start + num_prompt_batch]
            batch.n_tokens = len(piece)
            for index, token in enumerate(piece):
                batch.token[index], batch.pos[index] = token, position + start + index
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
                batch.logits[index] = start + index == len(ids) - 1
            assert library.llama_decode(context, batch) == 0, "llama_decode failed"
        found = ctypes.cast(library.llama_get_logits_ith(context, batch.n_tokens - 1), ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(found, (V,)).argmax())

    warm_up = _seconds(lambda: run(work.prompt(V)[:_WARM_PROMPT], 0))
    prefill = []
    for _ in range(work.num_prefills):
        library.llama_memory_clear(memory, True)
        stopwatch = Stopwatch()
        token = run(work.prompt(V), 0)
        prefill.append(stopwatch.interval(work.num_prompt))
    peak = peak_bytes()
    if work.num_cached > work.num_prompt:
        _repeat_cells(library, context, num_cells=work.num_cached)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is resident now
    positions = iter(range(work.num_cached, work.num_slots))
    decode = _decode(lambda last: run([last], next(positions)), token, work)
    return Timing(
        load_seconds=load,
        warm_up_seconds=warm_up,
        prefill=prefill,
        decode=decode,
        peak_bytes=max(peak, peak_bytes()),
    )


def run_ours(directory: Path, work: Work, *, cache: str) -> Timing:
    """Time this package as `btlm generate` uses it; it reads a whole prompt where others make up a cache."""
    from btlm_jax.decode.batch import generate
    from btlm_jax.decode.sampling import GREEDY
    from btlm_jax.generate.loading import load_for_generation

    began = time.perf_counter()
    native = load_for_generation(directory, as_int4=False)
    load, model = time.perf_counter() - began, native.metadata.network()

    def run(prompt: list[int]) -> Iterator[int]:
        made = generate(
            model,
            native.params,
            native.mesh,
            prompts=[prompt],
            num_tokens=1 + _WARM_TOKENS + work.num_decoded,
            sampling=GREEDY,
            seed=0,
            num_ids=model.config.vocab_size,
            stop_id=-1,
            cache_dtype=cache,
        )
        tokens = (tokens[0] for tokens in made)
        next(tokens)
        return tokens

    prompt = work.prompt(model.config.vocab_size)
    warm_up = _seconds(lambda: run(prompt))
    prefill = []
    for _ in range(work.num_prefills):
        stopwatch = Stopwatch()
        tokens = run(prompt)
        prefill.append(stopwatch.interval(work.num_prompt))
    if work.num_cached > work.num_prompt:
        tokens = run((prompt * (work.num_cached // work.num_prompt + 1))[: work.num_cached])
    decode = _decode(lambda _: next(tokens), 0, work)
    return Timing(load_seconds=load, warm_up_seconds=warm_up, prefill=prefill, decode=decode, peak_bytes=peak_bytes())


def _repeat_cells(library: ctypes.CDLL, context: int, *, num_cells: int) -> None:
    """Fill llama.cpp's cache by repeating what it holds, at positions 0, 1, ...

    Through its saved state, as found in this version's bytes: u32 magic, u32 0, u32 streams = 1, u32 cells; a cell: i32
    position, u32 1, u32 sequence 0; u32 is V transposed, u32 layers, u64 0; K of every layer: i32 type, u64 bytes a
    row, rows; V of every layer: the same, or transposed: i32 type, u32 bytes a value, u32 values a row, columns.
    """
    library.llama_state_seq_get_size.restype = library.llama_state_seq_get_data.restype = ctypes.c_size_t
    library.llama_state_seq_set_data.restype = ctypes.c_size_t
    held = np.empty(library.llama_state_seq_get_size(ctypes.c_void_p(context), 0), np.uint8)
    arguments = (ctypes.c_void_p(context), ctypes.c_void_p(held.ctypes.data), ctypes.c_size_t(len(held)), 0)
    assert library.llama_state_seq_get_data(*arguments) == len(held)
    pieces, offset = [], 0

    def take(dtype: str) -> int:
        nonlocal offset
        value = held[offset : offset + np.dtype(dtype).itemsize].view(dtype)
        offset += value.nbytes
        return int(value[0])

    def keep(value: int, dtype: str) -> None:
        pieces.append(np.array([value], dtype).view(np.uint8))

    def repeat(num_rows: int, row_bytes: int) -> None:
        """Copy `num_rows` rows of one value a cell."""
        nonlocal offset
        rows = held[offset : offset + num_rows * num_held * row_bytes].reshape(num_rows, num_held, row_bytes)
        pieces.append(rows[:, np.arange(num_cells) % num_held].reshape(-1))
        offset += rows.size

    for known in (_STATE_MAGIC, 0, 1):
        assert take("u4") == known, "llama.cpp's state has another form"
        keep(known, "u4")
    num_held = take("u4")
    keep(num_cells, "u4")
    assert [(take("i4"), take("u4"), take("u4")) for _ in range(num_held)] == [(cell, 1, 0) for cell in range(num_held)]
    cells = np.arange(num_cells)
    pieces.append(np.stack([cells, cells**0, 0 * cells], axis=1).astype("<i4").reshape(-1).view(np.uint8))
    transposed, num_layers = take("u4"), take("u4")
    keep(transposed, "u4")
    keep(num_layers, "u4")
    keep(take("u8"), "u8")
    for is_transposed in (False, bool(transposed)):
        for _ in range(num_layers):
            keep(take("i4"), "i4")
            if is_transposed:
                value_bytes, num_values = take("u4"), take("u4")
                keep(value_bytes, "u4")
                keep(num_values, "u4")
                repeat(num_values, value_bytes)
            else:
                row_bytes = take("u8")
                keep(row_bytes, "u8")
                repeat(1, row_bytes)
    assert offset == len(held), "llama.cpp's state has another form"
    filled = np.concatenate(pieces)
    arguments = (ctypes.c_void_p(context), ctypes.c_void_p(filled.ctypes.data), ctypes.c_size_t(len(filled)), 0)
    assert library.llama_state_seq_set_data(*arguments) == len(filled), "llama.cpp refused the state"


def _decode(next_token: Callable[[int], int], token: int, work: Work) -> list[Interval]:
    """Time tokens after those that warm up, a quarter of a second at a time."""
    for _ in range(_WARM_TOKENS):
        token = next_token(token)
    intervals, stopwatch, num_tokens = [], Stopwatch(), 0
    for index in range(work.num_decoded):
        token = next_token(token)
        num_tokens += 1
        if stopwatch.seconds > _INTERVAL_SECONDS or index == work.num_decoded - 1:
            intervals.append(stopwatch.interval(num_tokens))
            stopwatch, num_tokens = Stopwatch(), 0
    return intervals


class Stopwatch:
    """Times an interval, and what other processes did in it, by the kernel's count of busy CPU time."""

    def __init__(self):
        self._began, self._busy, self._own = time.perf_counter(), _busy_seconds(), time.process_time()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def interval(self, num_tokens: int) -> Interval:
        """Return the interval from the start until now."""
        seconds = self.seconds
        others = _busy_seconds() - self._busy - (time.process_time() - self._own)
        return Interval(num_tokens=num_tokens, seconds=seconds, others=max(0.0, others / seconds / os.cpu_count()))


def _busy_seconds() -> float:
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _seconds(run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def peak_bytes() -> int:
    """Return this process's largest resident memory so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
