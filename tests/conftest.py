"""Every test runs on 8 simulated CPU devices, whatever the machine has."""

import os

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("MPLBACKEND", "agg")


@pytest.fixture(scope="session")
def token_store(tmp_path_factory):
    """The directory of a tiny real token store, which no test may change."""
    from run_command import make_token_store

    return make_token_store(tmp_path_factory.mktemp("tiny") / "store")


@pytest.fixture(scope="session")
def tiny_run(token_store, tmp_path_factory):
    """(config file, workdir) of a tiny run that nothing disturbed, with all its checkpoints; no test may change it."""
    from run_command import run_btlm, train_arguments, write_config

    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_config(folder / "config.py", store=token_store)
    result = run_btlm(*train_arguments(config, folder / "run"))
    assert result.returncode == 0, result.stdout + result.stderr
    return config, folder / "run"
