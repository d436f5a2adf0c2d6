"""The configs for GPUs: every size of each trains what the family's file does, in whole micro-batches a GPU."""

import runpy

import pytest
from support.tiny import CONFIGS, config_dict

from btlm_jax.cli.parse import UsageError, find_config, load_config
from btlm_jax.plan.pod_table import training_fields
from btlm_jax.recipe.config import check_divisible, train_config_from

FILES = {path.stem: path for path in CONFIGS if path.parent.name == "gpu"}


@pytest.mark.parametrize("name", FILES)
def test_every_size_divides_by_its_gpus(name):
    sizes = runpy.run_path(str(FILES[name]))["LAYOUTS"]
    assert list(sizes) == ["111M", "256M", "590M", "1.3B", "2.7B"]
    for size in sizes:
        config = train_config_from(load_config(find_config(f"gpu/{name}"), argument=size, changes={}))
        check_divisible(config, num_devices=int(name.rpartition("_")[2]), slices=1)
        family = train_config_from(config_dict(f"family/{size}"))
        assert training_fields(config) == training_fields(family)


def test_another_size_is_refused():
    with pytest.raises(UsageError, match="gpu/80gb_8 has no size '3B', but 111M, 256M, 590M, 1.3B, 2.7B"):
        load_config(find_config("gpu/80gb_8"), argument="3B", changes={})
