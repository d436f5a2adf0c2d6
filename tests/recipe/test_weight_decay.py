"""The conventions of weight decay, and the decay that a power law gives, against their formulas."""

import dataclasses

import jax
import pytest
from support.tiny import config_dict, tiny_config

from btlm_jax.model import freeze, parameter_table, with_decay
from btlm_jax.model.transformer import make_model
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.recipe.config import train_config_from, value_from_text, with_later_keys
from btlm_jax.recipe.mup import make_parametrization
from btlm_jax.recipe.optimizer import learning_rate_at
from btlm_jax.train.checkpoint import Checkpointer, changed_settings
from btlm_jax.train.program import make_program
from btlm_jax.train.setup import describe_run, num_parameters

M, M_FF = 40 / 20, 54 / 24  # of the tiny config


@pytest.mark.parametrize("preset", ["btlm", "sp", "completep"])
def test_a_convention_decides_what_a_step_takes_of_each_class(preset):
    config = tiny_config(mup__preset=preset)
    model = make_model(config.model, make_parametrization(config.mup, config.model))
    table = freeze(parameter_table(model, make_mesh(devices=jax.devices()[:1], tensor=1)), ("ln_f",))
    widths = {"embedding": 1.0, "attention_in": M, "attention_out": M, "mlp_in": M, "mlp_out": M_FF}
    for convention in ("preset", "coupled", "independent"):
        independent = convention == "independent" or (convention == "preset" and preset == "completep")
        for info in jax.tree.leaves(with_decay(table, convention)):
            shrinks = info.rule.learning_rate * info.rule.weight_decay  # of eta lambda, a step
            width = widths.get(info.rule.parameter_class)
            expected = 0 if width is None else 1 if independent or preset == "sp" else 1 / width
            assert shrinks == pytest.approx(expected), (convention, info.path)


def test_the_default_leaves_the_rules_and_old_configs_as_they_are():
    config = tiny_config()
    values = dataclasses.asdict(config)
    del values["optimizer"]["weight_decay_convention"]
    assert train_config_from(with_later_keys(values)) == config
    model = make_model(config.model, make_parametrization(config.mup, config.model))
    mesh = make_mesh(devices=jax.devices()[:1], tensor=1)
    assert make_program(config, mesh).table == parameter_table(model, mesh)
    assert config.with_numbers() is config


@pytest.mark.parametrize("convention", ["coupled", "independent"])
def test_auto_is_the_power_law_at_btlm(convention):
    """BTLM's own 0.1 is near the law: 237 tokens a parameter, m = 10."""
    values = config_dict("btlm_3b_8k")
    values["optimizer"] |= {"weight_decay": "auto", "weight_decay_convention": convention}
    config = train_config_from(values)
    rate = 0.012 / (10 if convention == "coupled" else 1)
    assert config.curriculum.table.num_tokens == 159_636 * 3_932_160
    tau = 0.21 * (159_636 * 3_932_160 / 2_646_255_744 / 20) ** -0.527
    assert config.with_numbers().optimizer.decay == pytest.approx(1 / (rate * tau * 159_636), rel=1e-12)
    if convention == "coupled":
        assert config.with_numbers().optimizer.decay == pytest.approx(0.1, rel=0.1)


def test_auto_is_read_said_and_kept():
    assert value_from_text("optimizer.weight_decay", "auto") == "auto"
    assert value_from_text("optimizer.weight_decay", "0.25") == 0.25
    with pytest.raises(ValueError, match="optimizer.weight_decay=much must be a number, or 'auto'"):
        value_from_text("optimizer.weight_decay", "much")
    with pytest.raises(ValueError, match="optimizer.weight_decay='none' must be a number or 'auto'"):
        tiny_config(optimizer__weight_decay="none")
    with pytest.raises(ValueError, match="optimizer.weight_decay=None must be of type float, not NoneType"):
        tiny_config(optimizer__weight_decay=None)
    with pytest.raises(ValueError, match="optimizer.weight_decay=-1.0 must not be negative, or 'auto'"):
        tiny_config(optimizer__weight_decay=-1.0)
    config = tiny_config(optimizer__weight_decay="auto", optimizer__weight_decay_convention="independent")
    program = make_program(config, make_mesh(devices=jax.devices()[:1], tensor=1))
    assert program.config.optimizer.weight_decay == "auto"
    text = describe_run(config, program.table)
    steps = config.curriculum.table.num_steps
    tau = 0.21 * (config.curriculum.table.num_tokens / num_parameters(program.table) / 20) ** -0.527
    assert f"weight decay {1 / (0.006 * tau * steps):.4g} (auto: for " in text and "independent of the width" in text
    rows = [line for line in text.splitlines() if line.startswith(("  blocks/mlp/up/kernel", "  embedding/"))]
    assert [line.split()[-1] for line in rows] == [f"{tau:.4f}"] * 2  # m is in neither


def test_a_longer_run_says_that_its_decay_changes(tmp_path, monkeypatch):
    config = tiny_config(optimizer__weight_decay="auto", optimizer__schedule="constant")
    longer = dataclasses.replace(
        config, curriculum=dataclasses.replace(config.curriculum, num_tokens=(6 * 384, 12 * 384))
    )
    checkpointer = Checkpointer(tmp_path, config=config.checkpoint)
    monkeypatch.setattr(checkpointer, "steps", lambda: [3])
    monkeypatch.setattr(checkpointer, "read_metadata", lambda step: (None, config))
    changes = {change.key: (change.old, change.new) for change in changed_settings(checkpointer, longer)}
    assert changes.keys() == {"curriculum.num_tokens", "optimizer.weight_decay"}
    assert changes["optimizer.weight_decay"][1] < changes["optimizer.weight_decay"][0]


def test_decay_to_zero_ends_at_zero_and_is_named():
    config = tiny_config(optimizer__end_learning_rate=0.0)
    assert learning_rate_at(config.optimizer, tokens=3840, total_tokens=3840) == 0.0
    program = make_program(config, make_mesh(devices=jax.devices()[:1], tensor=1))
    assert "linear to 0 in 8 steps (3,072 tokens), a decay to zero; 0 at the end" in describe_run(config, program.table)
    assert "a decay to zero" not in describe_run(tiny_config(), program.table)
