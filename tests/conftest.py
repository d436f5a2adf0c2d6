"""Every test runs on 8 simulated CPU devices, whatever the machine has."""

import atexit
import gc
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import sys
import tempfile

import pytest
from hypothesis import settings

settings.register_profile("gate", deadline=None, derandomize=True, database=None)  # machines here may be busy
settings.load_profile("gate")

# A shell's background jobs begin with Ctrl-C ignored, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Where this is set, each process that a test starts compiles the sources of its libraries again: to load a model in
# transformers takes 21 CPU seconds in a fresh environment, and 8 once another process has written what it compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of what commands in processes of their own compile
os.environ.setdefault("MPLBACKEND", "agg")
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a later one ends at a flag that it does not know
    # XLA's older emitters, one LLVM module a program, compile in half the CPU seconds (Intel Xeon, 2 vCPU, 2026-11-29).
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="btlm_jax-modules-")  # copies of exported code
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", "only-for-tests" * 4  # read by importing ray

collect_ignore = []
if importlib.util.find_spec("torch") is None:
    collect_ignore += ["convert/test_modeling_btlm.py", "hub/test_dynamic_alibi.py", "hub/test_huggingface.py"]


def pytest_terminal_summary(terminalreporter):
    """Say what was not even collected."""
    if collect_ignore:
        terminalreporter.write_line(f"left out, as PyTorch is not installed: {', '.join(collect_ignore)}")


def pytest_collection_finish():
    """What is imported stays: the garbage collector need not look at it again and again."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def pytest_collection_modifyitems(items):
    """Put the files with slow tests first: the workers that pytest-xdist hands whole files end at about one time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(tryfirst=True)  # before the fixtures of the test are made
def pytest_runtest_setup(item):
    """Compile without LLVM's costly passes, in half the time (Intel Xeon, 2 vCPU, 2026-11-29).

    Tests compile much and compute little. Tests and modules marked fully_optimized compile as a user does.
    """
    if "jax" in sys.modules:
        marked = item.get_closest_marker("fully_optimized") is not None
        sys.modules["jax"].config.update("jax_disable_most_optimizations", not marked)


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory):
    """Compile what several tests compile once in a run of pytest; its workers and commands share the folder.

    JAX_COMPILATION_CACHE_DIR names another folder, which the next run finds.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    settings = {
        "jax_compilation_cache_dir": os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(folder / "compiled"),
        "jax_compilation_cache_max_size": 1 << 33,  # a limit is what makes JAX lock
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_enable_xla_caches": "none",  # as training sets it: it is part of the keys
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)
        if "jax" in sys.modules:  # a test module of this run has imported it
            sys.modules["jax"].config.update(name, value)


def made_once(tmp_path_factory, name: str, make):
    """Return a folder that `make` fills, once in a run of pytest: the first of its workers to come makes it."""
    import fcntl

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / f"{name}.made").exists():
            (folder / name).mkdir()
            make(folder / name)
            (folder / f"{name}.made").touch()
    return folder / name


@pytest.fixture(scope="session")
def token_store(tmp_path_factory):
    """The directory of a small real token store, which no test may change."""
    from support.real_store import build_real_store

    return made_once(tmp_path_factory, "tiny", lambda folder: build_real_store(folder / "store")) / "store"


@pytest.fixture(scope="session")
def tiny_run(token_store, tmp_path_factory):
    """(config file, workdir) of a tiny run that nothing disturbed, with all its checkpoints; no test may change it."""
    from support.real_store import write_config
    from support.run_command import run_btlm, train_arguments

    def make(folder):
        config = write_config(
            folder / "config.py", store=token_store, checkpoint__keep_last=50, log__every_steps=3, log__sample_tokens=3
        )
        result = run_btlm(*train_arguments(config, folder / "run"), variables={"JAX_COMPILATION_CACHE_DIR": ""})
        assert result.returncode == 0, result.stdout + result.stderr

    folder = made_once(tmp_path_factory, "undisturbed", make)
    return folder / "config.py", folder / "run"


@pytest.fixture
def unfinished_run(tiny_run, tmp_path):
    """(config, workdir): a copy of the undisturbed run whose last complete checkpoint is step 3."""

    from support.run_command import checkpoint_steps

    config, finished = tiny_run
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "summary.json").unlink()
    for step in checkpoint_steps(workdir):
        if step > 3:
            shutil.rmtree(workdir / "checkpoints" / str(step))
    return config, workdir
