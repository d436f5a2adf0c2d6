"""The real llama.cpp as an oracle: the C library inside the xllamacpp wheel, called through ctypes.

Each call runs in a process of its own: llama.cpp writes to stderr and aborts where Python would raise.
"""

import ctypes
import importlib.util
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np


class LlamaError(Exception):
    """llama.cpp refused, or died; the message is what it printed."""


def batch_logits(model: Path, ids_BT: np.ndarray) -> np.ndarray:
    """Return the logits_BTV after each token, each sequence decoded in one piece."""
    return _call("_logits", str(model), ids_BT, ids_BT.shape[1])


def stepwise_logits(model: Path, ids_BT: np.ndarray) -> np.ndarray:
    """Return the logits_BTV after each token, decoded one token at a time from the KV cache."""
    return _call("_logits", str(model), ids_BT, 1)


def tokenize(model: Path, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text; the names of control tokens in it are ordinary text."""
    return _call("_tokenize", str(model), texts)


def prompt_ids(model: Path, texts: list[str]) -> list[list[int]]:
    """Return the ids of prompts, as llama.cpp's programs make them: the names of special tokens stand for their ids."""
    return _call("_tokenize", str(model), texts, True)


def greedy(model: Path, prompts: list[list[int]], *, num_tokens: int) -> list[tuple[list[int], list[float]]]:
    """Return for each prompt the likeliest ids after it, and by how much each one's logit is above the second best."""
    return _call("_greedy", str(model), prompts, num_tokens)


def quantize(matrices: list[tuple[np.ndarray, int, int]]) -> list[np.ndarray]:
    """Return the bytes [num_bytes] of llama.cpp's own quantizer for each (rows_RC, type code, num_bytes)."""
    return _call("_quantize", matrices)


def _call(function: str, *arguments):
    with tempfile.TemporaryDirectory() as scratch:
        request, answer = Path(scratch) / "request", Path(scratch) / "answer"
        request.write_bytes(pickle.dumps((function, arguments)))
        done = subprocess.run([sys.executable, __file__, request, answer], capture_output=True, text=True)
        if done.returncode:
            raise LlamaError(f"exit code {done.returncode}: {done.stderr[-3000:]}")
        return pickle.loads(answer.read_bytes())


class _Params(ctypes.Structure):
    """llama_model_params or llama_context_params: larger than both, so it can be passed by value as either."""

    _fields_ = [("words", ctypes.c_int32 * 128)]


# int32 offsets in llama_context_params (include/llama.h), and the defaults that show they are still there
_N_CTX, _N_BATCH, _N_UBATCH, _N_THREADS, _N_THREADS_BATCH = 0, 1, 2, 7, 8
_FLASH_ATTENTION, _TYPE_K, _TYPE_V = 13, 26, 27
_DEFAULTS = {_N_CTX: 512, _N_BATCH: 2048, _N_UBATCH: 512, _N_THREADS: 4, _N_THREADS_BATCH: 4, _FLASH_ATTENTION: -1,
             _TYPE_K: 1, _TYPE_V: 1}  # fmt: skip
_F32, _NO_FLASH_ATTENTION = 0, 0


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def _library() -> ctypes.CDLL:
    folder = Path(importlib.util.find_spec("xllamacpp").origin).parent
    library = ctypes.CDLL(str(next(folder.glob("xllamacpp*.so"))))
    for name, result in {
        "llama_model_default_params": _Params, "llama_context_default_params": _Params, "llama_batch_init": _Batch,
        "llama_model_load_from_file": ctypes.c_void_p, "llama_init_from_model": ctypes.c_void_p,
        "llama_model_get_vocab": ctypes.c_void_p, "llama_get_logits_ith": ctypes.POINTER(ctypes.c_float),
        "llama_get_memory": ctypes.c_void_p, "ggml_quantize_chunk": ctypes.c_size_t,
    }.items():  # fmt: skip
        getattr(library, name).restype = result
    library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Params]
    library.llama_init_from_model.argtypes = [ctypes.c_void_p, _Params]
    library.llama_decode.argtypes = [ctypes.c_void_p, _Batch]
    library.llama_get_logits_ith.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    library.llama_get_memory.argtypes = library.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    library.llama_vocab_n_tokens.argtypes = [ctypes.c_void_p]
    library.llama_memory_clear.argtypes = [ctypes.c_void_p, ctypes.c_bool]
    library.llama_tokenize.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool
    ]  # fmt: skip
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p
    ]  # fmt: skip
    library.llama_backend_init()
    return library


def _load(library: ctypes.CDLL, model: str) -> int:
    loaded = library.llama_model_load_from_file(model.encode(), library.llama_model_default_params())
    assert loaded, "llama.cpp cannot load the model"
    return loaded


class _Context:
    """A loaded model, and a cache for one sequence of up to `num_slots` ids."""

    def __init__(self, model: str, *, num_slots: int):
        self._library = library = _library()
        loaded = _load(library, model)
        params = library.llama_context_default_params()
        assert all(params.words[offset] == value for offset, value in _DEFAULTS.items()), "llama_context_params changed"
        for offset, value in {
            _N_CTX: num_slots, _N_BATCH: num_slots, _N_UBATCH: num_slots, _N_THREADS: 1, _N_THREADS_BATCH: 1,
            _TYPE_K: _F32, _TYPE_V: _F32, _FLASH_ATTENTION: _NO_FLASH_ATTENTION,
        }.items():  # fmt: skip
            params.words[offset] = value
        self._context = library.llama_init_from_model(loaded, params)
        assert self._context, "llama.cpp cannot make a context"
        self.vocab_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(loaded))
        self._batch = library.llama_batch_init(num_slots, 0, 1)

    def clear(self) -> None:
        """Begin a new sequence."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def decode(self, ids, *, start: int) -> np.ndarray:
        """Return the logits_TV after each of more ids, the first of them at position `start`."""
        batch = self._batch
        batch.n_tokens = len(ids)
        for index in range(batch.n_tokens):
            batch.token[index], batch.pos[index] = int(ids[index]), start + index
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
        assert self._library.llama_decode(self._context, batch) == 0, "llama_decode failed"
        found = (self._library.llama_get_logits_ith(self._context, index) for index in range(batch.n_tokens))
        return np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)).copy() for row in found])


def _logits(model: str, ids_BT: np.ndarray, piece: int) -> np.ndarray:
    B, T = ids_BT.shape
    context = _Context(model, num_slots=T)
    logits_BTV = np.empty((B, T, context.vocab_size), np.float32)
    for row, ids_T in enumerate(ids_BT):
        context.clear()
        for start in range(0, T, piece):
            logits_BTV[row, start : start + piece] = context.decode(ids_T[start : start + piece], start=start)
    return logits_BTV


def _greedy(model: str, prompts: list[list[int]], num_tokens: int) -> list[tuple[list[int], list[float]]]:
    context, found = _Context(model, num_slots=max(map(len, prompts)) + num_tokens), []
    for prompt in prompts:
        context.clear()
        made, margins, newest = [], [], prompt
        while len(made) < num_tokens:
            logits_V = context.decode(newest, start=len(prompt) + len(made) - len(newest))[-1]
            second, best = np.sort(logits_V)[-2:]
            newest = [int(logits_V.argmax())]
            made += newest
            margins.append(float(best - second))
        found.append((made, margins))
    return found


def _tokenize(model: str, texts: list[str], parse_special: bool = False) -> list[list[int]]:
    library = _library()
    vocab = library.llama_model_get_vocab(_load(library, model))
    found = []
    for text in texts:
        encoded = text.encode()
        ids = np.empty(len(encoded) + 8, np.int32)
        count = library.llama_tokenize(vocab, encoded, len(encoded), ids.ctypes.data, len(ids), True, parse_special)
        assert count >= 0, "llama_tokenize failed"
        found.append(ids[:count].tolist())
    return found


def _quantize(matrices: list[tuple[np.ndarray, int, int]]) -> list[np.ndarray]:
    library, found = _library(), []
    for rows_RC, type_code, num_bytes in matrices:
        rows_RC, out = np.ascontiguousarray(rows_RC, np.float32), np.zeros(num_bytes, np.uint8)
        written = library.ggml_quantize_chunk(type_code, rows_RC.ctypes.data, out.ctypes.data, 0, *rows_RC.shape, None)
        assert written == num_bytes
        found.append(out)
    return found


if __name__ == "__main__":
    name, given = pickle.loads(Path(sys.argv[1]).read_bytes())
    Path(sys.argv[2]).write_bytes(pickle.dumps(globals()[name](*given)))
