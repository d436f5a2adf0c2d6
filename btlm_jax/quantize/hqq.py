"""Half-Quadratic Quantization: move each group's zero point until the error is sparse. It needs no calibration data.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (mobiusml.github.io/hqq_blog).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.quantize.grouped import MAX_CODE, Grid, Int4Matrix, min_max_grid, nearest_codes

P_NORM = 0.7  # p < 1 of the error's norm allows a few large errors if most are small
BETA, KAPPA, NUM_STEPS = 10.0, 1.01, 20  # the authors' settings


def half_quadratic(w_KM: np.ndarray, group_size: int) -> Int4Matrix:
    """Round to the min-max grid with its offset moved to minimize sum |error|^p, p < 1; the scale is not changed.

    argmin_z |W - Q_z^-1(Q_z(W))|_p is solved with an auxiliary W_e by alternating (the paper's sp_1, sp_2):
      W_e <- shrink(W - W_q),  shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / beta)
      z   <- mean over the group of (codes - (W - W_e) / s),  then beta <- kappa beta
    The error is measured in steps of the group's grid, so that beta does not depend on the size of the weights (the
    authors' code measures it in the unit of the weights, where the errors of small weights all shrink to 0). Each group
    keeps its best offset, including the first one, so no group's error norm exceeds that of round-to-nearest.

    Raises:
      ValueError: as `round_to_nearest`.
    """
    grid = min_max_grid(w_KM, group_size)
    num_inputs, num_groups = len(w_KM), len(grid.scale_GM)
    # The last group is padded with rows of weight 0.
    filled_KM = np.pad(w_KM.astype(np.float32), ((0, num_groups * group_size - num_inputs), (0, 0)))
    weight_GI1 = (np.arange(len(filled_KM)) < num_inputs).astype(np.float32).reshape(num_groups, group_size, 1)
    w_GIM = filled_KM.reshape(num_groups, group_size, -1)
    offset_GM = np.asarray(_best_offset(w_GIM, weight_GI1, grid.scale_GM, grid.offset_GM))
    moved_grid = Grid(scale_GM=grid.scale_GM, offset_GM=offset_GM)
    codes_KM = nearest_codes(w_KM, moved_grid, group_size)
    return Int4Matrix(codes_KM=codes_KM, scale_GM=grid.scale_GM, offset_GM=offset_GM, group_size=group_size)


@jax.jit
def _best_offset(w_GIM, weight_GI1, scale_GM, offset_GM):
    # A group of one value has scale 0; with any other scale, its error is still 0 at the first offset.
    scale_G1M = jnp.where(scale_GM > 0, scale_GM, 1).astype(jnp.float32)[:, None]
    num_G1 = weight_GI1.sum(1)

    def error_of(offset_GM):
        """Return the codes, and the error in steps of the grid."""
        steps_GIM = (w_GIM - offset_GM[:, None].astype(jnp.float32)) / scale_G1M
        codes_GIM = jnp.clip(jnp.rint(steps_GIM), 0, MAX_CODE)
        return codes_GIM, steps_GIM - codes_GIM

    def norm_of(error_GIM):
        return (weight_GI1 * jnp.abs(error_GIM) ** P_NORM).sum(1)

    def move(carry, step):
        offset_GM, best_GM, best_norm_GM = carry
        codes_GIM, error_GIM = error_of(offset_GM)
        auxiliary_GIM = _shrink(error_GIM, BETA * KAPPA**step)
        in_steps_GIM = w_GIM / scale_G1M
        zero_GM = (weight_GI1 * (codes_GIM - (in_steps_GIM - auxiliary_GIM))).sum(1) / num_G1
        offset_GM = (-zero_GM * scale_G1M[:, 0]).astype(jnp.float16)
        norm_GM = norm_of(error_of(offset_GM)[1])
        better_GM = norm_GM < best_norm_GM
        return (offset_GM, jnp.where(better_GM, offset_GM, best_GM), jnp.minimum(norm_GM, best_norm_GM)), None

    start = (offset_GM, offset_GM, norm_of(error_of(offset_GM)[1]))
    (_, best_GM, _), _ = jax.lax.scan(move, start, jnp.arange(NUM_STEPS))
    return best_GM


def _shrink(x, beta):
    magnitude = jnp.abs(x)
    return jnp.sign(x) * jnp.maximum(0, magnitude - jnp.maximum(magnitude, 1e-9) ** (P_NORM - 1) / beta)
