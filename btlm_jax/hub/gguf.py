"""Read a GGUF file as llama.cpp does: its keys, its tensors by rows, the logits and token ids that follow from them.

A conversion is proven with it, so everything comes from the file and nothing from the writer. Network and tokenizers
follow llama.cpp (src/models/jais.cpp, src/llama-vocab.cpp).
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from btlm_jax import install_command
from btlm_jax.tokenizers.sentencepiece_proto import SPACE_MARK, USER_DEFINED

if TYPE_CHECKING:
    from gguf.gguf_reader import GGUFReader, ReaderTensor

_ROWS = 1024  # of a matrix, read at a time, which bounds the copies of dequantization


def import_gguf():
    """Return the gguf package.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"writing GGUF needs the gguf package: {install_command('gguf')}") from error
    return gguf


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Type, shape and position of a tensor in the file."""

    type_name: str
    shape: tuple[int, ...]  # row-major
    offset: int  # in bytes from the start of the file
    row_bytes: int


class GGUFFile:
    """A GGUF file of architecture "jais". Tensors are read on request, by rows, without mapping the file."""

    def __init__(self, path: Path):
        """Read the keys and the positions of the tensors.

        Raises:
          ValueError: the file is damaged or of another architecture.
        """
        self._path = path
        try:
            reader = _make_reader(path)
        except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged or not a GGUF file: {error}") from error
        self.keys = {name: field.contents() for name, field in reader.fields.items()}
        if self.keys.get("general.architecture") != "jais":
            raise ValueError(f"{path} is of the architecture {self.keys.get('general.architecture')!r}, not 'jais'")
        if empty := [tensor.name for tensor in reader.tensors if not len(tensor.shape) or 0 in tensor.shape]:
            raise ValueError(f"{path} is damaged: tensor {empty[0]!r} has no values")
        self.tensors = {tensor.name: _stored_tensor(tensor) for tensor in reader.tensors}

    def read(self, name: str) -> np.ndarray:
        """Return a whole tensor, float32.

        Raises:
          ValueError: the file does not have it, or ends before it does.
        """
        shape = self._tensor(name).shape
        whole = np.empty(shape, np.float32)
        for start in range(0, shape[0], _ROWS):
            whole[start : start + _ROWS] = self.rows(name, start, min(start + _ROWS, shape[0]))
        return whole

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return the rows [start, stop) of a matrix, or elements of a vector; float32. Raises what `read` raises."""
        gguf, tensor = import_gguf(), self._tensor(name)
        is_vector = len(tensor.shape) == 1
        first, count = (0, 1) if is_vector else (start, stop - start)
        data = np.fromfile(
            self._path, np.uint8, count * tensor.row_bytes, offset=tensor.offset + first * tensor.row_bytes
        )
        if data.size != count * tensor.row_bytes:
            raise ValueError(f"{self._path} ends inside tensor {name}")
        type_code = gguf.GGMLQuantizationType[tensor.type_name]
        float_dtype = {"F32": np.float32, "F16": np.float16}.get(tensor.type_name)
        encoded = data.reshape(count, tensor.row_bytes)
        rows_RC = gguf.quants.dequantize(encoded if float_dtype is None else encoded.view(float_dtype), type_code)
        return rows_RC[0, start:stop] if is_vector else rows_RC

    def gather(self, name: str, rows_T: np.ndarray) -> np.ndarray:
        """Return the given rows of a matrix, float32. Raises what `read` raises."""
        return np.concatenate([self.rows(name, int(row), int(row) + 1) for row in rows_T])

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise ValueError(f"{self._path} lacks tensor {name}")
        return self.tensors[name]


def _make_reader(path: Path) -> GGUFReader:
    """Return the library's reader, which would not notice that a file ends inside a list of 2**60 items."""

    class Reader(import_gguf().GGUFReader):
        def _get(self, offset, dtype, *arguments, **options):
            if int(offset) >= len(self.data):
                raise ValueError("it ends inside its keys")
            return super()._get(offset, dtype, *arguments, **options)

    return Reader(path)


def _stored_tensor(tensor: ReaderTensor) -> StoredTensor:
    shape = tuple(int(size) for size in tensor.shape[::-1])
    num_rows = math.prod(shape[:-1])
    return StoredTensor(
        type_name=tensor.tensor_type.name,
        shape=shape,
        offset=int(tensor.data_offset),
        row_bytes=int(tensor.n_bytes) // num_rows,
    )


def gguf_logits(file: GGUFFile, ids_T: np.ndarray) -> np.ndarray:
    """Return the float32 logits_TV after each token, as llama.cpp's "jais" computes them, one tensor at a time.

    Scores are q.k/head_dim - slope * distance, the MLP is down(silu(gate(x)) * up(x)), and nothing else is scaled.
    llama.cpp also rounds the inputs of products with block types to 8 bits, which is not done here.

    Raises:
      ValueError: a tensor or a key is missing, or the file is cut short.
    """
    try:
        num_layers, num_heads = file.keys["jais.block_count"], file.keys["jais.attention.head_count"]
        epsilon = np.float32(file.keys["jais.attention.layer_norm_epsilon"])
        slopes_N = _llama_cpp_slopes(num_heads, max_bias=file.keys["jais.attention.max_alibi_bias"])
    except KeyError as error:
        raise ValueError(f"the written file lacks the key {error}") from error

    def linear(x_TD: np.ndarray, name: str) -> np.ndarray:
        return x_TD @ file.read(f"{name}.weight").T + file.read(f"{name}.bias")

    def norm(x_TD: np.ndarray, name: str) -> np.ndarray:
        # Of thousands of deviations a float32 mean is too coarse by 1e-4 of one.
        centred_TD = (x_TD - x_TD.mean(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
        normed_TD = centred_TD / np.sqrt((centred_TD**2).mean(-1, keepdims=True) + epsilon)
        return normed_TD * file.read(f"{name}.weight") + file.read(f"{name}.bias")

    x_TD = file.gather("token_embd.weight", ids_T)
    for layer in range(num_layers):
        block = f"blk.{layer}."
        q_TD, k_TD, v_TD = np.split(linear(norm(x_TD, block + "attn_norm"), block + "attn_qkv"), 3, axis=-1)
        attended_TD = _attend(q_TD, k_TD, v_TD, slopes_N)
        x_TD = x_TD + linear(attended_TD, block + "attn_output")
        normed_TD = norm(x_TD, block + "ffn_norm")
        gate_TF = linear(normed_TD, block + "ffn_gate")
        gate_TF *= 0.5 * (1 + np.tanh(0.5 * gate_TF))  # silu, without overflow
        x_TD = x_TD + linear(gate_TF * linear(normed_TD, block + "ffn_up"), block + "ffn_down")
    x_TD = norm(x_TD, "output_norm")
    num_tokens = file.tensors["output.weight"].shape[0] if "output.weight" in file.tensors else 0
    parts = [
        x_TD @ file.rows("output.weight", start, min(start + _ROWS, num_tokens)).T
        for start in range(0, max(num_tokens, 1), _ROWS)
    ]
    return np.concatenate(parts, axis=-1)


def _attend(q_TD: np.ndarray, k_TD: np.ndarray, v_TD: np.ndarray, slopes_N: np.ndarray) -> np.ndarray:
    T, D = q_TD.shape
    head_dim = D // len(slopes_N)
    distance_TS = np.arange(T)[:, None] - np.arange(T)
    attended_TD = np.empty_like(q_TD)
    for head, slope in enumerate(slopes_N):
        columns = slice(head * head_dim, (head + 1) * head_dim)
        scores_TS = q_TD[:, columns] @ k_TD[:, columns].T * np.float32(1 / head_dim) - slope * distance_TS.astype(
            np.float32
        )
        scores_TS[distance_TS < 0] = -np.inf
        weights_TS = np.exp(scores_TS - scores_TS.max(-1, keepdims=True))
        attended_TD[:, columns] = weights_TS @ v_TD[:, columns] / weights_TS.sum(-1, keepdims=True)
    return attended_TD


def _llama_cpp_slopes(num_heads: int, *, max_bias: float) -> np.ndarray:
    """Return the slope of each head, as ggml_compute_forward_soft_max_f32 computes it."""
    power = 2 ** math.floor(math.log2(num_heads))
    first, between = 2 ** (-max_bias / power), 2 ** (-max_bias / 2 / power)
    slopes = [first ** (head + 1) if head < power else between ** (2 * (head - power) + 1) for head in range(num_heads)]
    return np.asarray(slopes, np.float32)


class GGUFTokenizer:
    """Text to ids by the keys of a file, as llama.cpp does when control tokens are not parsed in the text."""

    def __init__(self, keys: dict):
        self._keys = keys
        self._id_of = {token: number for number, token in enumerate(keys["tokenizer.ggml.tokens"])}
        self.eos_id = keys["tokenizer.ggml.eos_token_id"]
        self.prompt_bos_id = keys["tokenizer.ggml.bos_token_id"] if keys["tokenizer.ggml.add_bos_token"] else None
        self.num_tokens = len(keys["tokenizer.ggml.tokens"])

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ids: list[int] = []
        if self._keys["tokenizer.ggml.model"] == "gpt2":
            for fragment in self._fragments(text):
                ids += [fragment] if isinstance(fragment, int) else self._byte_level.encode(fragment).ids
            return ids
        follows_symbol = True  # or starts the text: llama.cpp adds a space in both places
        for fragment in self._fragments(text):
            if isinstance(fragment, int):
                ids.append(fragment)
            else:
                space = " " if follows_symbol and self._keys["tokenizer.ggml.add_space_prefix"] else ""
                ids += self._merge((space + fragment).replace(" ", SPACE_MARK))
            follows_symbol = isinstance(fragment, int)
        return ids

    @functools.cached_property
    def _byte_level(self) -> Tokenizer:
        merges = [tuple(merge.split(" ")) for merge in self._keys["tokenizer.ggml.merges"]]
        tokenizer = Tokenizer(models.BPE(vocab=self._id_of, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pre "gpt-2"
        return tokenizer

    def _fragments(self, text: str) -> list[str | int]:
        """Split a text at the user-defined pieces, the longest piece first (tokenizer_st_partition)."""
        types = self._keys["tokenizer.ggml.token_type"]
        symbols = [piece for piece, number in self._id_of.items() if types[number] == USER_DEFINED]
        fragments: list[str | int] = [text] if text else []
        for symbol in sorted(symbols, key=len, reverse=True):
            split: list[str | int] = []
            for fragment in fragments:
                parts = [fragment] if isinstance(fragment, int) else fragment.split(symbol)
                for at, part in enumerate(parts):
                    split += [self._id_of[symbol]] * (at > 0) + [part] * (part != "")
            fragments = split
        return fragments

    def _merge(self, text: str) -> list[int]:
        """Merge the leftmost pair of the best score until no pair is a token (llm_tokenizer_spm_session)."""
        scores = self._keys["tokenizer.ggml.scores"]
        symbols, after = list(text), list(range(1, len(text) + 1))
        before = list(range(-1, len(text) - 1))
        queue: list[tuple[float, int, int, str]] = []

        def add(left: int, right: int) -> None:
            if left >= 0 and right < len(symbols):
                pair = symbols[left] + symbols[right]
                if pair in self._id_of:
                    heapq.heappush(queue, (-scores[self._id_of[pair]], left, right, pair))

        for left in range(len(symbols) - 1):
            add(left, left + 1)
        while queue:
            _, left, right, pair = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != pair:
                continue  # one of the two has been merged with another
            symbols[left], symbols[right] = pair, ""
            after[left] = after[right]
            if after[left] < len(symbols):
                before[after[left]] = left
            add(before[left], left)
            add(left, after[left])
        ids: list[int] = []
        for symbol in filter(None, symbols):
            ids += [self._id_of[symbol]] if symbol in self._id_of else self._byte_ids(symbol)
        return ids

    def _byte_ids(self, symbol: str) -> list[int]:
        return [self._id_of[f"<0x{byte:02X}>"] for byte in symbol.encode()]
