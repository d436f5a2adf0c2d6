"""A cache of keys and values in which each head has slots for its ALiBi window only; and attention over it.

Keys beyond a head's window (attention/alibi.py) have no weight that float32 could show, so their slots are used again:
head n has a ring of window + MAX_PIECE slots, and position p is in slot p modulo that. For 32 heads and 8,192 tokens
this is 40 % of all keys and values. The window assumes scores that spread over SPREAD nats. How much weight can have
been dropped by that is bounded at every step, from the norms of the keys that were really there.

Letters: L layers, B rows, T new tokens, N heads, H head dim, S slots of all heads, one head after the other.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.attention.alibi import SPREAD, alibi_slopes, alibi_window, dynamic_factor
from btlm_jax.kernels.build import has_kernels
from btlm_jax.recipe.config import ModelConfig

MAX_PIECE = 256  # tokens that may be added at a time
DROPPED_ATTENTION = 1e-6  # share of a head's attention outside its window that is said; float32 rounds at 6e-8
DTYPES = ("float32", "bfloat16", "int8")
_WIDEST = 1 << 30  # of windows, which the kernels take as int32; longer than any sequence


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """The slots of each head in a cache for sequences of up to `length` tokens."""

    length: int
    alibi_train_len: int  # of dynamic scaling; 0: none
    slopes: tuple[float, ...]  # before dynamic scaling
    windows: tuple[int, ...]  # a head sees so many tokens, its own included
    slots: tuple[int, ...]  # of each head

    @property
    def firsts(self) -> np.ndarray:
        """First slot of each head, int32 [N]."""
        return np.cumsum([0, *self.slots[:-1]]).astype(np.int32)

    @property
    def num_slots(self) -> int:
        return sum(self.slots)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """Keys and values in float32, bfloat16, or int8 with one scale per token and head; and the largest norm of keys."""

    k_LBSH: jax.Array
    v_LBSH: jax.Array
    k_scale_LBS: jax.Array  # float32; of a single element unless int8
    v_scale_LBS: jax.Array
    longest_key_LBN: jax.Array  # Euclidean norm, of all keys so far


def make_layout(config: ModelConfig, *, length: int, alibi_train_len: int = 0) -> CacheLayout:
    """Return the layout for sequences of up to `length` tokens.

    Its windows are those of attention/alibi.py where scores spread over SPREAD nats. Under dynamic scaling they are of
    the slopes at `length`, the flattest, and so grow with the layout; a key that was outside of a window may be inside
    of a later one, so every head has slots for all keys.
    """
    slopes = alibi_slopes(config.num_heads, scaling=config.alibi_scaling)
    flattest = slopes / dynamic_factor(length, alibi_train_len, xp=np)
    windows = np.ceil(alibi_window(SPREAD, flattest.astype(np.float64), xp=np))
    windows = np.minimum(windows, _WIDEST).astype(int).tolist()
    slots = [length if alibi_train_len else min(window + MAX_PIECE, length) for window in windows]
    return CacheLayout(length, alibi_train_len, tuple(slopes.tolist()), tuple(windows), tuple(slots))


def make_cache(config: ModelConfig, layout: CacheLayout, *, batch_size: int, dtype: str) -> Cache:
    """Make an empty cache.

    Raises:
      ValueError: the dtype is none of DTYPES.
    """
    if dtype not in DTYPES:
        raise ValueError(f"cache_dtype={dtype!r} is not known; allowed are {', '.join(DTYPES)}")
    slots = (config.num_layers, batch_size, layout.num_slots)
    scales = slots if dtype == "int8" else (1, 1, 1)
    return Cache(
        k_LBSH=jnp.zeros((*slots, config.head_dim), jnp.dtype(dtype)),
        v_LBSH=jnp.zeros((*slots, config.head_dim), jnp.dtype(dtype)),
        k_scale_LBS=jnp.zeros(scales, jnp.float32),
        v_scale_LBS=jnp.zeros(scales, jnp.float32),
        longest_key_LBN=jnp.zeros((config.num_layers, batch_size, config.num_heads), jnp.float32),
    )


def resize_cache(cache: Cache, old: CacheLayout, new: CacheLayout) -> Cache:
    """Return the cache in a longer layout: the slots of each head stay in order, new ones follow them."""
    old_slots = np.zeros(new.num_slots, np.int32)
    for first, count, old_first in zip(new.firsts, old.slots, old.firsts, strict=True):
        old_slots[first : first + count] = old_first + np.arange(count)  # a ring that wraps has one size in both

    def move(array):
        return array if array.shape[2] == 1 else jnp.take(array, old_slots, axis=2)

    return dataclasses.replace(
        cache,
        k_LBSH=move(cache.k_LBSH),
        v_LBSH=move(cache.v_LBSH),
        k_scale_LBS=move(cache.k_scale_LBS),
        v_scale_LBS=move(cache.v_scale_LBS),
    )


def attend(
    q_BTNH, k_BTNH, v_BTNH, cache: Cache, *, layout: CacheLayout, layer, starts_B, counts_B, lengths_B, scale: float
):
    """Cache the first counts_B new keys and values of each row, at positions starts_B + t, and attend to the cache.

    lengths_B are the tokens of each row at the end of the call of which this is a piece: dynamic scaling follows them.

    Returns o_BTNH (zero beyond counts_B), the cache, and dropped_B: a bound on the share of any head's weight that
    belongs to keys outside its window.
    """
    factor_B = dynamic_factor(lengths_B, layout.alibi_train_len, xp=jnp)
    slopes_BN = jnp.array(layout.slopes, jnp.float32) / factor_B[:, None]
    if not has_kernels():
        return _attend_in_xla(q_BTNH, k_BTNH, v_BTNH, cache, layout, slopes_BN, layer, starts_B, counts_B, scale)
    arrays = (cache.k_LBSH, cache.v_LBSH, cache.k_scale_LBS, cache.v_scale_LBS, cache.longest_key_LBN)
    dropped = jax.ShapeDtypeStruct((q_BTNH.shape[0], q_BTNH.shape[2]), jnp.float32)
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (q_BTNH, *arrays)]
    call = jax.ffi.ffi_call("btlm_attend", [*shapes, dropped], input_output_aliases={3: 1, 4: 2, 5: 3, 6: 4, 7: 5})
    windows_N = np.array(layout.windows, np.int32)
    at = jnp.reshape(layer, (1,)).astype(jnp.int32)
    o_BTNH, *arrays, dropped_BN = call(
        q_BTNH, k_BTNH, v_BTNH, *arrays, starts_B, counts_B, at, slopes_BN, windows_N, layout.firsts,
        scale=np.float32(scale),
    )  # fmt: skip
    return o_BTNH, Cache(**dict(zip(_FIELDS, arrays, strict=True))), dropped_BN.max(-1)


_FIELDS = tuple(field.name for field in dataclasses.fields(Cache))


def _attend_in_xla(q_BTNH, k_BTNH, v_BTNH, cache, layout, slopes_BN, layer, starts_B, counts_B, scale):
    """Compute the same as attend.cc in XLA, one head at a time over all of its slots."""
    (B, T), q_BTNH = q_BTNH.shape[:2], jnp.asarray(q_BTNH)
    slots_N, firsts_N = np.array(layout.slots), layout.firsts
    position_BT = starts_B[:, None] + jnp.arange(T)
    is_new_BT = jnp.arange(T) < counts_B[:, None]
    slot_BTN = jnp.where(is_new_BT[..., None], firsts_N + position_BT[..., None] % slots_N, layout.num_slots)
    rows_B11 = jnp.arange(B)[:, None, None]

    def write(cached, scales, new_BTNH):
        if cached.dtype != jnp.int8:
            return cached.at[layer, rows_B11, slot_BTN].set(new_BTNH.astype(cached.dtype), mode="drop"), scales
        scale_BTN = jnp.abs(new_BTNH).max(-1) / 127
        codes_BTNH = jnp.round(new_BTNH / jnp.where(scale_BTN > 0, scale_BTN, 1)[..., None]).astype(jnp.int8)
        cached = cached.at[layer, rows_B11, slot_BTN].set(codes_BTNH, mode="drop")
        return cached, scales.at[layer, rows_B11, slot_BTN].set(scale_BTN, mode="drop")

    k_LBSH, k_scale_LBS = write(cache.k_LBSH, cache.k_scale_LBS, k_BTNH)
    v_LBSH, v_scale_LBS = write(cache.v_LBSH, cache.v_scale_LBS, v_BTNH)
    length_BTN = jnp.where(is_new_BT[..., None], jnp.linalg.norm(k_BTNH, axis=-1), 0)
    longest_LBN = cache.longest_key_LBN.at[layer].max(length_BTN.max(1))
    own_slot_S = jnp.arange(max(layout.slots))

    def one_head(n):
        num_slots, window = jnp.array(slots_N)[n], jnp.array(layout.windows)[n]
        slope_B1 = slopes_BN[:, n][:, None]
        at_S = jnp.minimum(jnp.array(firsts_N)[n] + own_slot_S, layout.num_slots - 1)

        def read(cached, scales):
            x_BSH = cached[layer][:, at_S].astype(jnp.float32)
            return x_BSH * scales[layer][:, at_S][..., None] if cached.dtype == jnp.int8 else x_BSH

        k_BSH, v_BSH = read(k_LBSH, k_scale_LBS), read(v_LBSH, v_scale_LBS)
        newest_B1 = (starts_B + counts_B - 1)[:, None]
        position_BS = newest_B1 - (newest_B1 - own_slot_S) % num_slots  # the newest position that can be in a slot
        distance_BTS = position_BT[..., None] - position_BS[:, None]
        seen_BTS = (
            (distance_BTS >= 0) & (distance_BTS < window) & (position_BS >= 0)[:, None] & (own_slot_S < num_slots)
        )
        q_BTH = q_BTNH[:, :, n]
        scores_BTS = scale * jnp.einsum("BTH,BSH->BTS", q_BTH, k_BSH, precision="highest")
        scores_BTS -= slope_B1[..., None] * distance_BTS
        scores_BTS = jnp.where(seen_BTS, scores_BTS, -1e30)
        o_BTH = jnp.einsum("BTS,BSH->BTH", jax.nn.softmax(scores_BTS), v_BSH, precision="highest")
        highest_BT = scale * jnp.linalg.norm(q_BTH, axis=-1) * longest_LBN[layer][:, n][:, None] - slope_B1 * window
        share_BT = jnp.exp(jnp.minimum(highest_BT - scores_BTS.max(-1), 80)) / -jnp.expm1(-slope_B1)
        dropped_B = jnp.where(is_new_BT & (position_BT >= window), share_BT, 0).max(-1)
        return jnp.where(is_new_BT[..., None], o_BTH, 0), dropped_B

    o_NBTH, dropped_NB = jax.lax.map(one_head, jnp.arange(len(slots_N)))
    arrays = (k_LBSH, v_LBSH, k_scale_LBS, v_scale_LBS, longest_LBN)
    return jnp.moveaxis(o_NBTH, 0, 2), Cache(**dict(zip(_FIELDS, arrays, strict=True))), dropped_NB.max(0)
