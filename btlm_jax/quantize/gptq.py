"""GPTQ: round one row at a time, and correct the rows that are not rounded yet for its error.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv:2210.17323), of which this is Algorithm 1. The paper's W is ours transposed: its columns are our rows, inputs k.
"""

from __future__ import annotations

import numpy as np

from btlm_jax.quantize.grouped import MAX_CODE, Grid, Int4Matrix, check_weights, min_max_grid

DAMPING = 0.01  # of the Hessian's mean diagonal, added to it (the paper's section 3.3, step 3)


def gptq(w_KM: np.ndarray, group_size: int, *, hessian_KK: np.ndarray) -> Int4Matrix:
    """Round so that the outputs on the calibration inputs X change little, |X W - X W_q|^2; the Hessian is X^T X.

    With H^-1 = U^T U (U the upper Cholesky factor, step 3), row k has the error e = (w_k - q_k) / U_kk, and U_kj e is
    subtracted from every later row j (equations 2 and 3). A block of the lazy batch update (step 2) is a group here,
    whose grid is computed from its updated rows just before they are rounded (section 4, "grouping"). Inputs with
    larger activations come first, as in the authors' --act-order, but the rows of a group stay together.

    Raises:
      ValueError: as `round_to_nearest`, or the Hessian is not finite.
    """
    check_weights(w_KM, group_size)
    if not np.isfinite(hessian_KK).all():
        raise ValueError("the calibration inputs are not finite")
    groups = activation_order(np.diagonal(hessian_KK), group_size)
    order_K = np.concatenate(groups)
    factor_KK = _inverse_factor(hessian_KK[np.ix_(order_K, order_K)])
    updated_KM = w_KM[order_K].astype(np.float32)  # corrected for the errors of the rows before
    codes_KM = np.empty(w_KM.shape, np.uint8)
    scale_GM, offset_GM = np.empty((2, len(groups), w_KM.shape[1]), np.float16)
    start = 0
    for rows_I in groups:
        stop = start + len(rows_I)
        grid = min_max_grid(updated_KM[start:stop], group_size)
        codes_KM[rows_I], errors_IM = _round_group(updated_KM[start:stop], grid, factor_KK[start:stop, start:stop])
        updated_KM[stop:] -= factor_KK[start:stop, stop:].T @ errors_IM
        group = rows_I[0] // group_size
        scale_GM[group], offset_GM[group] = grid.scale_GM[0], grid.offset_GM[0]
        start = stop
    return Int4Matrix(codes_KM=codes_KM, scale_GM=scale_GM, offset_GM=offset_GM, group_size=group_size)


def activation_order(power_K: np.ndarray, group_size: int) -> list[np.ndarray]:
    """Return the inputs of each group: groups by descending mean power, the inputs of a group by descending power."""
    groups = [np.arange(start, min(start + group_size, len(power_K))) for start in range(0, len(power_K), group_size)]
    groups.sort(key=lambda inputs_I: -power_K[inputs_I].mean())
    return [inputs_I[np.argsort(-power_K[inputs_I], kind="stable")] for inputs_I in groups]


def _round_group(w_IM: np.ndarray, grid: Grid, factor_II: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes of a group's rows, and each row's error divided by the factor's diagonal element."""
    w_IM = w_IM.copy()
    codes_IM, errors_IM = np.empty(w_IM.shape, np.uint8), np.empty_like(w_IM)
    scale_M, offset_M = grid.scale_GM[0].astype(np.float32), grid.offset_GM[0].astype(np.float32)
    step_M = np.where(scale_M > 0, scale_M, np.inf)  # a grid of one value has scale 0 and only code 0
    for row in range(len(w_IM)):
        codes_IM[row] = np.clip(np.rint((w_IM[row] - offset_M) / step_M), 0, MAX_CODE)
        rounded_M = codes_IM[row] * scale_M + offset_M
        errors_IM[row] = (w_IM[row] - rounded_M) / factor_II[row, row]
        w_IM[row + 1 :] -= factor_II[row, row + 1 :, None] * errors_IM[row]
    return codes_IM, errors_IM


def _inverse_factor(hessian_KK: np.ndarray) -> np.ndarray:
    """Return the float32 upper U_KK with U^T U = (H + damping)^-1; for a Hessian of zeros, the identity."""
    damped_KK = hessian_KK.astype(np.float64)
    mean = np.diagonal(damped_KK).mean()
    damped_KK[np.diag_indices_from(damped_KK)] += DAMPING * mean if mean > 0 else 1.0
    return np.linalg.cholesky(np.linalg.inv(damped_KK), upper=True).astype(np.float32)
