"""TPUs that are not there: what a test needs to compile for them."""

import importlib.util
from unittest import mock

import pytest

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, which compiles for TPUs, is not installed: pip install 'btlm_jax[tpu]'",
)


@pytest.fixture(scope="module")
def quickly_compiled():
    """Compile as for a TPU with little vector memory: several times as fast, the same to what is done with plans."""
    with mock.patch("btlm_jax.train.flops._SCOPED_VMEM_KIB", {}):
        yield
