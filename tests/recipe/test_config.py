"""Configs: strict in, equal out, every field read."""

import dataclasses
import json
import re
import typing

import pytest
from support.tiny import CONFIGS, REPOSITORY, config_dict, tiny_config

from btlm_jax.recipe.config import CurriculumConfig, TrainConfig, train_config_from

NAMES = [str(path.relative_to(REPOSITORY / "configs").with_suffix("")) for path in CONFIGS]


@pytest.mark.parametrize("name", NAMES)
def test_every_config_file_makes_a_config_that_survives_json(name):
    config = train_config_from(config_dict(name))
    parsed = json.loads(config.to_json())
    assert train_config_from(parsed) == config
    assert config.to_json() == json.dumps(parsed, indent=2, sort_keys=True)


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
        (
            lambda c: c["model"].update(zzz=3),
            "unknown config key config.model.zzz; known keys are vocab_size, num_layers",
        ),
        (lambda c: c["model"].pop("d_ff"), "config.model.d_ff is missing"),
        (lambda c: c.pop("log"), "config key config.log is missing"),
        (lambda c: c["model"].update(d_ff="7"), "config.model.d_ff='7' must be of type int, not str"),
        (lambda c: c["model"].update(num_layers=True), "must be of type int, not bool"),
        (lambda c: c.update(mup=3), "config.mup must be a table of keys"),
        (
            lambda c: c["curriculum"].update(seq_len=(1.5, 2)),
            r"config.curriculum.seq_len=\(1.5, 2\) must be a tuple of",
        ),
        (
            lambda c: c["curriculum"].update(seq_len=256),
            "config.curriculum.seq_len=256 must be a tuple of whole numbers",
        ),
        (
            lambda c: c["curriculum"].update(seq_len="12"),
            "config.curriculum.seq_len='12' must be a tuple of whole numbers",
        ),
        (lambda c: c["optimizer"].update(eps=True), "config.optimizer.eps=True must be of type float, not bool"),
        (lambda c: c["model"].update(num_heads=3), "model.d_model=256 is not divisible by model.num_heads=3"),
        (
            lambda c: c["model"].update(dtype="float16"),
            "model.dtype='float16' is not known; allowed are float32, bfloat16",
        ),
        (lambda c: c["model"].update(attention="flash"), "model.attention='flash' is not known; allowed are auto, "),
        (lambda c: c["model"].update(remat="some"), "model.remat='some' is not known; allowed are full, "),
        (lambda c: c["mup"].update(preset="mup"), "mup.preset='mup' is not known; allowed are btlm, sp, completep"),
        (lambda c: c.update(seed=10**20), "seed=100000000000000000000 must be a number of 32 bits"),
        (lambda c: c["model"].update(vocab_size=10**11), "model.vocab_size=100,000,000,000 must be positive and below"),
        (lambda c: c["optimizer"].update(peak_learning_rate=float("inf")), "peak_learning_rate=inf must be a finite"),
        (lambda c: c["optimizer"].update(eps=float("nan")), "config.optimizer.eps=nan must be a finite number"),
        (lambda c: c["optimizer"].update(schedule_tokens=10**400), "schedule_tokens=a number of 1329 bits is too"),
        (lambda c: c["optimizer"].update(eps=10**400), "config.optimizer.eps=a number of 1329 bits must be of type"),
        (lambda c: c["log"].update(sample_prompt="a\ud800"), "log.sample_prompt is not valid Unicode"),
        *(
            (lambda c, given=given: c["log"].update(trackers=given), "must name each of wandb, mlflow at most once")
            for given in ("comet", "wandb,", "wandb,wandb", "Wandb", " ")
        ),
        *(
            (lambda c, given=given: c["log"].update(profile_steps=given), "must be FIRST:LAST, such as 100:105 for six")
            for given in ("100", "0:5", "9:8", "1:101", "-1:3", "1:2:3", "a:b", "\u0661:\u0662", "5:", " 1:2")
        ),
        (lambda c: c["log"].update(profile_steps="600:601"), "600:601 is not in the run, which has steps 1 to 600"),
        (lambda c: c["corpus"].update(source="web"), "corpus.source='web' is not known; allowed are prepared, "),
        (lambda c: c["model"].update(alibi_scaling=0.5), "must be at least 1"),
        (lambda c: c["optimizer"].update(beta1=-0.1), r"optimizer.beta1=-0.1 must be in \[0, 1\)"),
        (lambda c: c["optimizer"].update(beta2=1.0), r"optimizer.beta2=1.0 must be in \[0, 1\)"),
        (lambda c: c["optimizer"].update(end_learning_rate=-1.0), "end_learning_rate=-1.0 must not be negative"),
        (lambda c: c["optimizer"].update(warmup_tokens=-1), "optimizer.warmup_tokens=-1 must not be negative"),
        (lambda c: c["optimizer"].update(weight_decay=-1.0), "optimizer.weight_decay=-1.0 must not be negative"),
        (lambda c: c["optimizer"].update(warmup_tokens=10**9), "is more than the run's"),
        (lambda c: c["mesh"].update(accumulation=3), "of phase 1 is not divisible by mesh.accumulation=3"),
        (lambda c: c["data"].update(store=""), "data.store is empty"),
        (lambda c: c["corpus"].update(heldout_fraction=0.0), "heldout_fraction=0.0 must be between 0 and 1"),
        (lambda c: c["corpus"].update(heldout_fraction=1.0), "heldout_fraction=1.0 must be between 0 and 1"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name(change, message):
    values = config_dict("local_cpu")
    change(values)
    with pytest.raises(ValueError, match=message):
        train_config_from(values)


def test_trackers_and_steps_to_trace_are_read():
    log = tiny_config(log__trackers="wandb, mlflow", log__profile_steps="3:10").log
    assert log.tracker_names == ("wandb", "mlflow") and list(log.profile_window) == [3, 4, 5, 6, 7, 8, 9, 10]
    log = tiny_config().log
    assert log.tracker_names == () and not log.profile_window


@pytest.mark.parametrize(
    "key",
    [
        *("model." + name for name in "vocab_size num_layers d_model num_heads d_ff layer_norm_eps loss_chunk".split()),
        *("mup." + name for name in "base_d_model base_d_ff base_num_layers init_std".split()),
        *("mup.embedding_multiplier", "mup.output_multiplier"),
        *("optimizer.peak_learning_rate", "optimizer.eps", "optimizer.clip_norm"),
        *("mesh.tensor", "mesh.context", "mesh.accumulation"),
        *("data.max_epochs", "data.prefetch", "corpus.max_bytes", "corpus.heldout_bytes_per_source"),
        *("evaluation.every_steps", "evaluation.blocks_per_source", "evaluation.batch_size"),
        *("checkpoint.every_steps", "checkpoint.keep_last", "checkpoint.keep_every"),
        *("log.every_steps", "log.sample_tokens", "bad_numbers.max_skips"),
    ],
)
def test_zero_is_refused_where_a_number_must_be_positive(key):
    section, name = key.split(".")
    zero = type(config_dict("local_cpu")[section][name])(0)
    with pytest.raises(ValueError, match=f"{key}={zero} must be positive"):
        tiny_config(**{f"{section}__{name}": zero})


def test_what_a_step_counts_has_32_bits():
    with pytest.raises(ValueError, match=r"bad_numbers.max_skips=2,147,483,648 must be positive and below 2\*\*31"):
        tiny_config(bad_numbers__max_skips=2**31)
    config = tiny_config(
        bad_numbers__max_skips=2**31 - 1, optimizer__warmup_tokens=2**62, optimizer__schedule_tokens=2**62
    )
    assert [config.update_rule(phase).watched_from for phase in config.curriculum.table.phases] == [10, 10]


def test_the_least_values_are_allowed():
    tiny_config(
        model__num_layers=1, model__num_heads=1, model__alibi_scaling=1.0, mesh__tensor=1, optimizer__beta1=0.0,
        optimizer__beta2=0.0, optimizer__weight_decay=0.0, optimizer__end_learning_rate=0.0, optimizer__warmup_tokens=0,
    )  # fmt: skip
    tiny_config(optimizer__warmup_tokens=10 * 384)  # the whole run


@pytest.mark.parametrize(
    "key, names",
    [
        ("model__dtype", "float32 bfloat16"),
        ("model__attention", "auto reference blockwise cpu tpu splash gpu"),
        ("model__remat", "full attention_saved out_recomputed matmuls_saved none"),
        ("mup__preset", "btlm sp completep"),
        ("corpus__source", "prepared installed_python"),
    ],
)
def test_every_choice_is_allowed(key, names):
    for name in names.split():
        tiny_config(**{key: name})


def test_head_dim():
    assert tiny_config(model__d_model=40, model__num_heads=4).model.head_dim == 10


def test_a_phase_is_named_whose_batch_accumulation_does_not_divide():
    with pytest.raises(ValueError, match="curriculum.batch_size=8 of phase 2 is not divisible by mesh.accumulation=16"):
        tiny_config(mesh__accumulation=16)


def test_a_section_is_checked_without_the_others():
    with pytest.raises(ValueError, match="phase 2 has"):
        CurriculumConfig(seq_len=(24, 48), batch_size=(16, 9), num_tokens=(384, 384))


def test_whole_numbers_are_accepted_for_floats_and_not_the_other_way():
    assert repr(tiny_config(optimizer__clip_norm=1).optimizer.clip_norm) == "1.0"
    with pytest.raises(ValueError, match="must be of type int, not float"):
        tiny_config(model__num_layers=2.0)
