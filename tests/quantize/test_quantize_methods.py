"""Each way to round a matrix, against its formula written out as loops, and for what it is chosen for."""

import numpy as np
import pytest

from btlm_jax.quantize.awq import NUM_EXPONENTS, best_scale
from btlm_jax.quantize.gptq import DAMPING, activation_order, gptq
from btlm_jax.quantize.grouped import Int4Matrix, dequantize, min_max_grid, round_to_nearest, round_to_nearest_int8
from btlm_jax.quantize.hqq import BETA, KAPPA, NUM_STEPS, P_NORM, half_quadratic

K, M, GROUP = 22, 5, 8  # groups of 8, 8 and 6 inputs
GROUPS = [slice(0, 8), slice(8, 16), slice(16, 22)]


def on_eye(w_KM, group_size):
    return gptq(w_KM, group_size, hessian_KK=np.eye(len(w_KM), dtype=np.float32))


METHODS = [round_to_nearest, half_quadratic, on_eye]
EVERY = [*METHODS, round_to_nearest_int8]


def weights(seed=0, shape=(K, M)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def correlated_inputs(seed=1, num_rows=300):
    """Inputs that follow one another, with means and two loud channels."""
    random = np.random.default_rng(seed)
    x_RK = random.standard_normal((num_rows, K)).cumsum(axis=1) / 3 + random.standard_normal(K)
    x_RK[:, [3, 17]] *= 12
    return x_RK.astype(np.float32)


def output_error(x_RK, w_KM, grouped):
    return np.square(x_RK.astype(np.float64) @ (w_KM - dequantize(grouped))).sum()


def assert_same(actual: Int4Matrix, expected: Int4Matrix):
    np.testing.assert_array_equal(actual.codes_KM, expected.codes_KM)
    np.testing.assert_array_equal(actual.scale_GM, expected.scale_GM)
    np.testing.assert_array_equal(actual.offset_GM, expected.offset_GM)


def test_nearest_takes_the_nearest_of_sixteen_values_between_the_extremes_of_its_group():
    w_KM = weights()
    grouped = round_to_nearest(w_KM, GROUP)
    assert grouped.codes_KM.dtype == np.uint8 and grouped.scale_GM.dtype == grouped.offset_GM.dtype == np.float16
    found_KM = dequantize(grouped)
    assert found_KM.dtype == np.float32
    for g, group in enumerate(GROUPS):
        for m in range(M):
            low, high = w_KM[group, m].min(), w_KM[group, m].max()
            assert grouped.offset_GM[g, m] == np.float16(low)
            assert grouped.scale_GM[g, m] == np.float16((high - low) / 15)
            values = [float(grouped.offset_GM[g, m]) + code * float(grouped.scale_GM[g, m]) for code in range(16)]
            for k in range(group.start, group.stop):
                nearest = min(range(16), key=lambda code: abs(values[code] - float(w_KM[k, m])))  # noqa: B023
                assert grouped.codes_KM[k, m] == nearest
                np.testing.assert_allclose(found_KM[k, m], values[nearest], rtol=1e-6, atol=1e-7)


def test_eight_bits_take_the_nearest_of_255_values_around_zero():
    w_KM = weights()
    grouped = round_to_nearest_int8(w_KM, GROUP)
    assert grouped.codes_KM.dtype == np.int8 and grouped.scale_GM.dtype == np.float16
    for g, group in enumerate(GROUPS):
        for m in range(M):
            scale = np.float16(np.abs(w_KM[group, m]).max() / 127)
            assert grouped.scale_GM[g, m] == scale
            expected = [max(-127, min(127, round(float(w) / float(scale)))) for w in w_KM[group, m]]
            assert grouped.codes_KM[group, m].tolist() == expected
            np.testing.assert_allclose(dequantize(grouped)[group, m], np.multiply(expected, float(scale)), rtol=1e-6)


@pytest.mark.parametrize("round_matrix", EVERY)
def test_a_group_of_one_value_keeps_it(round_matrix):
    w_KM = weights()
    w_KM[GROUPS[1], 2], w_KM[GROUPS[2], 0] = -0.3125, 0.0
    found_KM = dequantize(round_matrix(w_KM, GROUP))
    tolerance = 2**-9 if round_matrix is round_to_nearest_int8 else 0  # of -0.3125, which is no float16 times 127
    np.testing.assert_allclose(found_KM[GROUPS[1], 2], -0.3125, rtol=tolerance)
    np.testing.assert_array_equal(found_KM[GROUPS[2], 0], 0)


@pytest.mark.parametrize("round_matrix", EVERY)
@pytest.mark.parametrize("group_size", [1, 7, K, 64])
def test_any_group_size_serves(round_matrix, group_size):
    w_KM = weights()
    grouped = round_matrix(w_KM, group_size)
    assert grouped.codes_KM.shape == (K, M) and grouped.scale_GM.shape == (-(-K // group_size), M)
    assert np.abs(dequantize(grouped) - w_KM).max() < (1e-3 if group_size == 1 else 0.3)


@pytest.mark.parametrize("round_matrix", EVERY)
@pytest.mark.parametrize(("value", "message"), [(np.nan, "not finite"), (-np.inf, "not finite"), (4e6, "too large")])
def test_what_float16_cannot_scale_is_refused(round_matrix, value, message):
    w_KM = weights()
    w_KM[4, 1] = value * (127 if round_matrix is round_to_nearest_int8 else 1)
    with pytest.raises(ValueError, match=message):
        round_matrix(w_KM, GROUP)


@pytest.mark.parametrize("round_matrix", EVERY)
def test_a_group_size_below_one_is_refused(round_matrix):
    with pytest.raises(ValueError, match="group_size=0 must be at least 1"):
        round_matrix(weights(), 0)


def test_hqq_is_the_papers_alternation():
    w_KM = weights(seed=2)
    start, grouped = min_max_grid(w_KM, GROUP), half_quadratic(w_KM, GROUP)
    np.testing.assert_array_equal(grouped.scale_GM, start.scale_GM)
    moved = 0
    for g, group in enumerate(GROUPS):
        for m in range(M):
            w, s = w_KM[group, m].astype(np.float64), float(start.scale_GM[g, m])

            def norm_of(offset, w=w, s=s):
                codes = np.clip(np.round((w - offset) / s), 0, 15)
                return (np.abs((w - offset) / s - codes) ** P_NORM).sum()

            offset = float(start.offset_GM[g, m])
            best, beta = offset, BETA
            for _ in range(NUM_STEPS):
                z = -offset / s
                codes = np.clip(np.round(w / s + z), 0, 15)
                error = w / s - (codes - z)
                shrunk = np.sign(error) * np.maximum(0, np.abs(error) - np.abs(error) ** (P_NORM - 1) / beta)
                offset = float(np.float16(-s * np.mean(codes - (w / s - shrunk))))
                beta *= KAPPA
                if norm_of(offset) < norm_of(best):
                    best = offset
            np.testing.assert_allclose(norm_of(float(grouped.offset_GM[g, m])), norm_of(best), rtol=1e-3)
            assert norm_of(best) <= norm_of(float(start.offset_GM[g, m]))
            moved += best != float(start.offset_GM[g, m])
    assert moved >= 4  # of 15 groups


def test_gptq_without_correlations_is_round_to_nearest():
    w_KM = weights()
    diagonal = np.diag(np.linspace(0.1, 9, K)).astype(np.float32)
    for hessian_KK in (np.eye(K, dtype=np.float32), diagonal, np.zeros((K, K), np.float32)):
        assert_same(gptq(w_KM, GROUP, hessian_KK=hessian_KK), round_to_nearest(w_KM, GROUP))


def test_gptq_is_optimal_brain_quantization_in_a_fixed_order():
    """Equations 2 and 3 as they stand: the inverse Hessian of the rows that remain, taken anew for each row."""
    w_KM, x_RK = weights(seed=3), correlated_inputs()
    hessian_KK = (x_RK.T @ x_RK).astype(np.float64)
    damped_KK = hessian_KK + DAMPING * np.trace(hessian_KK) / K * np.eye(K)
    rest_KM, found_KM, remaining = w_KM.astype(np.float64), np.zeros((K, M)), list(range(K))
    for group in sorted(GROUPS, key=lambda group: np.diagonal(hessian_KK)[group].mean(), reverse=True):
        grid = min_max_grid(rest_KM[group].astype(np.float32), GROUP)
        scale_M, offset_M = grid.scale_GM[0].astype(np.float64), grid.offset_GM[0].astype(np.float64)
        for k in sorted(range(group.start, group.stop), key=lambda k: hessian_KK[k, k], reverse=True):
            found_KM[k] = np.clip(np.round((rest_KM[k] - offset_M) / scale_M), 0, 15) * scale_M + offset_M
            inverse = np.linalg.inv(damped_KK[np.ix_(remaining, remaining)])
            place = remaining.index(k)
            step_M = (rest_KM[k] - found_KM[k]) / inverse[place, place]
            rest_KM[remaining] -= np.outer(inverse[:, place], step_M)
            remaining.remove(k)
    np.testing.assert_allclose(dequantize(gptq(w_KM, GROUP, hessian_KK=x_RK.T @ x_RK)), found_KM, atol=1e-5)


def test_gptq_takes_the_loudest_group_first_and_in_it_the_loudest_input():
    assert [inputs_I.tolist() for inputs_I in activation_order(np.array([1, 2, 3, 9, 8, 1, 7]), 3)] == [
        [6], [3, 4, 5], [2, 1, 0],
    ]  # fmt: skip


def test_gptq_keeps_the_outputs_closer_than_round_to_nearest():
    x_RK = correlated_inputs()
    for seed in range(5):
        w_KM = weights(seed)
        by_gptq = output_error(x_RK, w_KM, gptq(w_KM, GROUP, hessian_KK=x_RK.T @ x_RK))
        assert by_gptq < 0.6 * output_error(x_RK, w_KM, round_to_nearest(w_KM, GROUP))


def test_gptq_refuses_calibration_that_is_not_finite():
    hessian_KK = np.eye(K, dtype=np.float32)
    hessian_KK[2, 3] = np.nan
    with pytest.raises(ValueError, match="calibration inputs are not finite"):
        gptq(weights(), GROUP, hessian_KK=hessian_KK)


def test_awq_takes_the_exponent_with_the_least_output_error():
    w_KM, x_RK = weights(seed=4), correlated_inputs()

    def error_of(scale_K):
        scaled = round_to_nearest((w_KM * scale_K[:, None]).astype(np.float32), GROUP)
        return np.square(x_RK @ (dequantize(scaled) / scale_K[:, None] - w_KM)).sum()

    errors = []
    for step in range(NUM_EXPONENTS):
        scale_K = np.abs(x_RK).mean(0) ** (step / NUM_EXPONENTS)
        errors.append(error_of(scale_K / np.sqrt(scale_K.max() * scale_K.min())))
    found_K = best_scale(w_KM, x_RK, GROUP)
    np.testing.assert_allclose(error_of(found_K), min(errors), rtol=1e-3)
    assert min(errors) < 0.7 * errors[0]  # the loud channels are worth it
    assert found_K.dtype == np.float32
