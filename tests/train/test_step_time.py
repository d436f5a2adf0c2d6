"""The measured times of a run's parts: of its own programs, which the run then finds compiled."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from support.tiny import tiny_config

from btlm_jax.train import COMPILE_CACHE
from btlm_jax.train.step_time import measure_run


@pytest.fixture
def without_shared_folder(monkeypatch):
    """Keep executables where a user's run keeps them, not in the folder that the tests share."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    shared = jax.config.jax_compilation_cache_dir
    compilation_cache.reset_cache()
    yield
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", shared)


@pytest.mark.slow
@pytest.mark.usefixtures("without_shared_folder")
def test_every_phase_and_the_evaluation_are_timed_and_what_is_compiled_is_kept(tmp_path):
    # Equal phases, the second of which is found compiled: the test is shorter.
    config = tiny_config(curriculum__seq_len=(48, 48), curriculum__batch_size=(8, 8), model__attention="reference")
    times = measure_run(config, devices=jax.devices()[:1], workdir=tmp_path, seconds=0)
    assert len(times.steps) == len(config.curriculum.table.phases) == 2
    assert all(seconds > 0 for seconds in (times.prepare, times.compile, times.evaluation, *times.steps))
    kept = [path.name for path in (tmp_path / COMPILE_CACHE).iterdir()]
    assert sum(name.startswith("jit_train_step") for name in kept) >= 1
    assert any(name.startswith("jit_eval_step") for name in kept)
