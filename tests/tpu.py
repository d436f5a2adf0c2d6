"""TPUs that are not there: what a test needs to compile for them."""

import importlib.util

import pytest

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, which compiles for TPUs, is not installed: pip install 'btlm_jax[tpu]'",
)
