"""Keys and values of earlier tokens, kept for as long as ALiBi lets them count; and attention over them.

ALiBi takes slope x distance from a score, so what is further away than a head's window has no weight that float32 could
show, and its slot is used again: head n keeps a ring of window + MAX_PIECE slots, position p in slot p modulo its size.
For 32 heads and 8,192 tokens that is 40 % of all keys and values. How much weight could have been lost is bounded at
every step, from the lengths of the keys that were really seen (`lost`).

Letters: L layers, B rows, T new tokens, N heads, H head dim, S slots of all heads, one head after the other.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.attention.alibi import alibi_slopes
from btlm_jax.attention.alibi_window import SPREAD, reach
from btlm_jax.kernels.build import has_kernels
from btlm_jax.recipe.config import ModelConfig

MAX_PIECE = 256  # tokens that may be added at a time
DTYPES = ("float32", "bfloat16", "int8")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the heads lie among the slots of a cache for sequences of up to `length` tokens."""

    length: int
    slopes: tuple[float, ...]
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
    """Keys and values in float32, bfloat16, or int8 with one scale for a token and head, and the longest key so far."""

    k_LBSH: jax.Array
    v_LBSH: jax.Array
    k_scale_LBS: jax.Array  # float32; of a single element unless int8
    v_scale_LBS: jax.Array
    longest_key_LBN: jax.Array  # Euclidean length


def make_layout(config: ModelConfig, *, length: int) -> Layout:
    """Return the layout for sequences of up to `length` tokens.

    A window is as long as a head's reach where scores spread over SPREAD nats (attention/reach.py).
    """
    slopes = alibi_slopes(config.num_heads, scaling=config.alibi_scaling)
    windows = np.ceil(reach(SPREAD, slopes.astype(np.float64), xp=np)).astype(int).tolist()
    slots = [min(window + MAX_PIECE, length) for window in windows]
    return Layout(length, tuple(slopes.tolist()), tuple(windows), tuple(slots))


def make_cache(config: ModelConfig, layout: Layout, *, batch_size: int, dtype: str) -> Cache:
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


def grown(cache: Cache, old: Layout, new: Layout) -> Cache:
    """Return the cache in a longer layout; everything kept so far stays where its head begins."""
    places = np.zeros(new.num_slots, np.int32)
    for first, count, old_first in zip(new.firsts, old.slots, old.firsts, strict=True):
        places[first : first + count] = old_first + np.arange(count)  # a ring that wraps has one size in both

    def moved(array):
        return array if array.shape[2] == 1 else jnp.take(array, places, axis=2)

    return dataclasses.replace(
        cache,
        k_LBSH=moved(cache.k_LBSH),
        v_LBSH=moved(cache.v_LBSH),
        k_scale_LBS=moved(cache.k_scale_LBS),
        v_scale_LBS=moved(cache.v_scale_LBS),
    )


def attend(q_BTNH, k_BTNH, v_BTNH, cache: Cache, *, layout: Layout, layer, starts_B, counts_B, scale: float):
    """Keep the first counts_B new keys and values of each row at positions starts_B + t, and attend to all kept.

    Returns o_BTNH (zero beyond counts_B), the cache, and lost_B: a bound on the share of any head's weight that lay
    outside its window.
    """
    if not has_kernels():
        return _attend_in_xla(q_BTNH, k_BTNH, v_BTNH, cache, layout, layer, starts_B, counts_B, scale)
    kept = (cache.k_LBSH, cache.v_LBSH, cache.k_scale_LBS, cache.v_scale_LBS, cache.longest_key_LBN)
    lost = jax.ShapeDtypeStruct((q_BTNH.shape[0], q_BTNH.shape[2]), jnp.float32)
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (q_BTNH, *kept)]
    call = jax.ffi.ffi_call("btlm_attend", [*shapes, lost], input_output_aliases={3: 1, 4: 2, 5: 3, 6: 4, 7: 5})
    slopes_N, windows_N = np.array(layout.slopes, np.float32), np.array(layout.windows, np.int32)
    at = jnp.reshape(layer, (1,)).astype(jnp.int32)
    o_BTNH, *kept, lost_BN = call(
        q_BTNH, k_BTNH, v_BTNH, *kept, starts_B, counts_B, at, slopes_N, windows_N, layout.firsts,
        scale=np.float32(scale),
    )  # fmt: skip
    return o_BTNH, Cache(**dict(zip(_FIELDS, kept, strict=True))), lost_BN.max(-1)


_FIELDS = tuple(field.name for field in dataclasses.fields(Cache))


def _attend_in_xla(q_BTNH, k_BTNH, v_BTNH, cache, layout, layer, starts_B, counts_B, scale):
    """Compute what attend.cc computes, one head at a time over all of its slots."""
    (B, T), q_BTNH = q_BTNH.shape[:2], jnp.asarray(q_BTNH)
    slots_N, firsts_N = np.array(layout.slots), layout.firsts
    position_BT = starts_B[:, None] + jnp.arange(T)
    is_new_BT = jnp.arange(T) < counts_B[:, None]
    slot_BTN = jnp.where(is_new_BT[..., None], firsts_N + position_BT[..., None] % slots_N, layout.num_slots)
    rows_B11 = jnp.arange(B)[:, None, None]

    def put(kept, scales, new_BTNH):
        if kept.dtype != jnp.int8:
            return kept.at[layer, rows_B11, slot_BTN].set(new_BTNH.astype(kept.dtype), mode="drop"), scales
        scale_BTN = jnp.abs(new_BTNH).max(-1) / 127
        codes_BTNH = jnp.round(new_BTNH / jnp.where(scale_BTN > 0, scale_BTN, 1)[..., None]).astype(jnp.int8)
        kept = kept.at[layer, rows_B11, slot_BTN].set(codes_BTNH, mode="drop")
        return kept, scales.at[layer, rows_B11, slot_BTN].set(scale_BTN, mode="drop")

    k_LBSH, k_scale_LBS = put(cache.k_LBSH, cache.k_scale_LBS, k_BTNH)
    v_LBSH, v_scale_LBS = put(cache.v_LBSH, cache.v_scale_LBS, v_BTNH)
    length_BTN = jnp.where(is_new_BT[..., None], jnp.linalg.norm(k_BTNH, axis=-1), 0)
    longest_LBN = cache.longest_key_LBN.at[layer].max(length_BTN.max(1))
    own_slot_S = jnp.arange(max(layout.slots))

    def one_head(n):
        num_slots, slope, window = jnp.array(slots_N)[n], jnp.array(layout.slopes)[n], jnp.array(layout.windows)[n]
        at_S = jnp.minimum(jnp.array(firsts_N)[n] + own_slot_S, layout.num_slots - 1)

        def read(kept, scales):
            found_BSH = kept[layer][:, at_S].astype(jnp.float32)
            return found_BSH * scales[layer][:, at_S][..., None] if kept.dtype == jnp.int8 else found_BSH

        k_BSH, v_BSH = read(k_LBSH, k_scale_LBS), read(v_LBSH, v_scale_LBS)
        newest_B1 = (starts_B + counts_B - 1)[:, None]
        held_BS = newest_B1 - (newest_B1 - own_slot_S) % num_slots  # the newest position that a slot can hold
        distance_BTS = position_BT[..., None] - held_BS[:, None]
        seen_BTS = (distance_BTS >= 0) & (distance_BTS < window) & (held_BS >= 0)[:, None] & (own_slot_S < num_slots)
        q_BTH = q_BTNH[:, :, n]
        scores_BTS = scale * jnp.einsum("BTH,BSH->BTS", q_BTH, k_BSH, precision="highest") - slope * distance_BTS
        scores_BTS = jnp.where(seen_BTS, scores_BTS, -1e30)
        o_BTH = jnp.einsum("BTS,BSH->BTH", jax.nn.softmax(scores_BTS), v_BSH, precision="highest")
        highest_BT = scale * jnp.linalg.norm(q_BTH, axis=-1) * longest_LBN[layer][:, n][:, None] - slope * window
        share_BT = jnp.exp(jnp.minimum(highest_BT - scores_BTS.max(-1), 80)) / -jnp.expm1(-slope)
        lost_B = jnp.where(is_new_BT & (position_BT >= window), share_BT, 0).max(-1)
        return jnp.where(is_new_BT[..., None], o_BTH, 0), lost_B

    o_NBTH, lost_NB = jax.lax.map(one_head, jnp.arange(len(slots_N)))
    kept = (k_LBSH, v_LBSH, k_scale_LBS, v_scale_LBS, longest_LBN)
    return jnp.moveaxis(o_NBTH, 0, 2), Cache(**dict(zip(_FIELDS, kept, strict=True))), lost_NB.max(0)
