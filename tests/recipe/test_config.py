"""Configs: strict in, equal out, every field read."""

import dataclasses
import json
import re
import typing

import pytest
from support.tiny import CONFIGS, REPOSITORY, config_dict, tiny_config

from btlm_jax.recipe.config import TrainConfig, train_config_from

NAMES = [str(path.relative_to(REPOSITORY / "configs").with_suffix("")) for path in CONFIGS]


@pytest.mark.parametrize("name", NAMES)
def test_every_config_file_makes_a_config_that_survives_json(name):
    config = train_config_from(config_dict(name))
    assert train_config_from(json.loads(config.to_json())) == config


def test_config_files_differ_in_values_only():
    def keys(mapping: dict) -> dict:
        return {key: keys(value) if isinstance(value, dict) else type(value) for key, value in mapping.items()}

    first, *others = [keys(config_dict(name)) for name in NAMES]
    assert all(other == first for other in others)


def fields_of(cls: type) -> list[tuple[str, str]]:
    hints = typing.get_type_hints(cls)
    return [
        found
        for name, hint in hints.items()
        for found in (fields_of(hint) if dataclasses.is_dataclass(hint) else [(cls.__name__, name)])
    ]


def test_there_are_fewer_than_150_keys():
    assert 0 < len(fields_of(TrainConfig)) < 150


@pytest.mark.parametrize("cls, name", fields_of(TrainConfig))
def test_every_key_is_read_outside_config(cls, name):
    # curriculum's three tuples are read by CurriculumConfig.table, which is the reader of all others.
    sources = [path for path in (REPOSITORY / "btlm_jax").rglob("*.py") if path.name != "config.py"]
    if cls == "CurriculumConfig":
        sources = [REPOSITORY / "btlm_jax" / "recipe" / "config.py"]
    assert any(re.search(rf"\.{name}\b", path.read_text()) for path in sources), f"{cls}.{name} is read by nobody"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["model"].update(d_modell=3), "unknown config key config.model.d_modell; did you mean 'd_model'"),
        (lambda c: c["model"].pop("d_ff"), "config.model.d_ff is missing"),
        (lambda c: c["model"].update(d_ff="7"), "config.model.d_ff='7' must be of type int, not str"),
        (lambda c: c["model"].update(num_layers=True), "must be of type int, not bool"),
        (lambda c: c.update(mup=3), "config.mup must be a table of keys"),
        (lambda c: c["curriculum"].update(seq_len=(1.5, 2)), "tuple of whole numbers"),
        (lambda c: c["model"].update(num_heads=3), "model.d_model=256 is not divisible by model.num_heads=3"),
        (lambda c: c["model"].update(dtype="float16"), "model.dtype='float16' is not known; allowed are"),
        (lambda c: c["model"].update(alibi_scaling=0.5), "must be at least 1"),
        (lambda c: c["optimizer"].update(beta2=1.0), r"optimizer.beta2=1.0 must be in \[0, 1\)"),
        (lambda c: c["optimizer"].update(warmup_tokens=10**9), "is more than the run's"),
        (lambda c: c["mesh"].update(accumulation=3), "is not divisible by mesh.accumulation=3"),
        (lambda c: c["checkpoint"].update(every_steps=0), "checkpoint.every_steps=0 must be positive"),
        (lambda c: c["data"].update(store=""), "data.store is empty"),
        (lambda c: c["corpus"].update(heldout_fraction=1.0), "must be between 0 and 1"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name(change, message):
    values = config_dict("local_cpu")
    change(values)
    with pytest.raises(ValueError, match=message):
        train_config_from(values)


def test_whole_numbers_are_accepted_for_floats_and_not_the_other_way():
    assert tiny_config(optimizer__clip_norm=1).optimizer.clip_norm == 1.0
    with pytest.raises(ValueError, match="must be of type int, not float"):
        tiny_config(model__num_layers=2.0)
