"""The curve of a run beside a smaller one's: made-up curves that collapse, one that departs, in float64 sums."""

import dataclasses

import numpy as np
import pytest
from support.made_up_curve import write_curve
from support.tiny import tiny_config

from btlm_jax import notices
from btlm_jax.train import CONFIG_FILE
from btlm_jax.train.reference_curve import AFTER_WARMUP, SMOOTHING, TOLERANCE, ReferenceCurve

STEPS = 400


def config_of(num_steps: int, **changes):
    tokens = {"curriculum__num_tokens": (num_steps // 2 * 384, num_steps // 2 * 384)}
    return tiny_config(**tokens, optimizer__warmup_tokens=num_steps // 20 * 384, **changes)


def shape(share: np.ndarray) -> np.ndarray:
    return 1 + 0.8 * np.exp(-6 * share) + 0.1 * (1 - share)


@pytest.fixture
def reference(tmp_path):
    notices.begin(strict=())
    config = config_of(200)
    shares = np.arange(1, 201) / 200
    write_curve(tmp_path / "small", config, (5 * shape(shares)).tolist())
    return tmp_path / "small"


def smoothed(shares: np.ndarray, losses: np.ndarray, now: int) -> float:
    """The mean with weights exp(-distance / SMOOTHING), of steps of any length."""
    weights = np.diff(shares[: now + 1], prepend=0) * np.exp(-(shares[now] - shares[: now + 1]) / SMOOTHING)
    return float((weights * losses[: now + 1]).sum() / weights.sum())


def test_a_run_on_its_course_predicts_its_end_and_a_departure_is_said_while_the_loss_still_falls(reference):
    config = config_of(STEPS, model__num_layers=4, optimizer__weight_decay=0.05)
    shares = np.arange(1, STEPS + 1) / STEPS
    losses = 3 * shape(shares) * (1 + np.random.default_rng(0).normal(0, 0.01, STEPS))
    curve = ReferenceCurve(reference, config)
    found = [curve.add(384 * step, loss) for step, loss in enumerate(losses.tolist(), start=1)]
    assert "departed-from-reference" not in notices.counts()
    begin = int((1 / 20 + AFTER_WARMUP) * STEPS)
    assert [bool(numbers) for numbers in found] == [step >= begin for step in range(1, STEPS + 1)]
    ends = [numbers["predicted_loss"] for numbers in found if numbers]
    np.testing.assert_allclose(ends, 3 * shape(np.array(1.0)), rtol=0.015)
    other = np.arange(1, 201) / 200
    reference_at = [smoothed(other, 5 * shape(other), now) for now in range(200)]
    for now in (begin, 250, STEPS - 1):
        normal = np.interp(shares[now], other, np.array(reference_at) / reference_at[-1])
        assert found[now]["predicted_loss"] == pytest.approx(smoothed(shares, losses, now) / normal, rel=1e-12)
        past = np.sort([numbers["predicted_loss"] for numbers in found[begin - 1 : now + 1]])
        assert found[now]["collapse_residual"] == found[now]["predicted_loss"] / past[len(past) // 2] - 1

    notices.begin(strict=())
    faulty = losses * np.where(shares > 0.3, 1 + 0.4 * (shares - 0.3), 1)  # a fault that grows
    curve, said_at = ReferenceCurve(reference, config), 0
    for step, loss in enumerate(faulty.tolist(), start=1):
        numbers = curve.add(384 * step, loss)
        if notices.counts().get("departed-from-reference") and not said_at:
            said_at = step
            assert numbers["collapse_residual"] > TOLERANCE
    assert 0.35 < said_at / STEPS < 0.5
    assert notices.counts()["departed-from-reference"] == 1
    assert smoothed(shares, faulty, said_at) < smoothed(shares, faulty, said_at - STEPS // 20)  # and it still falls


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(reference, tmp_path):
    config = config_of(STEPS)
    losses = (3 * shape(np.arange(1, STEPS + 1) / STEPS)).tolist()
    losses[100] = float("nan")  # of a step without targets
    whole = ReferenceCurve(reference, config)
    expected = [whole.add(384 * step, loss) for step, loss in enumerate(losses, start=1)]
    write_curve(tmp_path / "run", config, losses[:300])  # a killed run, whose checkpoint is of step 250
    again = ReferenceCurve(reference, config)
    again.follow(tmp_path / "run", first_step=251)
    assert [again.add(384 * step, losses[step - 1]) for step in range(251, STEPS + 1)] == expected[250:]
    assert expected[100] == {} and expected[101]


def test_what_cannot_be_compared_is_refused_or_said(reference, tmp_path):
    with pytest.raises(FileNotFoundError, match="log.reference=.*none is no run: it has no config.json"):
        ReferenceCurve(tmp_path / "none", config_of(STEPS))
    write_curve(tmp_path / "half", config_of(200), [5.0] * 150)
    with pytest.raises(ValueError, match="half has trained 57,600 of 76,800 tokens; it must be a finished run"):
        ReferenceCurve(tmp_path / "half", config_of(STEPS))
    (tmp_path / "half" / CONFIG_FILE).write_text("{}")
    with pytest.raises(ValueError, match="config.json cannot be read: config key config.seed is missing"):
        ReferenceCurve(tmp_path / "half", config_of(STEPS))
    ReferenceCurve(reference, config_of(200))
    assert notices.counts() == {}
    notices.begin(strict=("reference-differs",))
    other = config_of(STEPS, optimizer__schedule="constant")
    with pytest.raises(notices.StrictError, match="tokens a parameter .* here; tau .*; schedule linear there, c"):
        ReferenceCurve(reference, other)
    muon = config_of(200, optimizer__hidden_optimizer="muon")
    with pytest.raises(
        notices.StrictError, match="course: tau 16.67 there, 2.5 here; hidden_optimizer adamw there, muon here"
    ):
        ReferenceCurve(reference, muon)
    optimizer = dataclasses.replace(config_of(200).optimizer, end_learning_rate=1e-5)
    with pytest.raises(notices.StrictError, match="end rate's share of the peak 0.017 there, 0.001667 here"):
        ReferenceCurve(reference, dataclasses.replace(config_of(200), optimizer=optimizer))
