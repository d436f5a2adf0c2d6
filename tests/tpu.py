"""TPUs that are not there: devices to compile for, through libtpu."""

import importlib.util
import os

import pytest

os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no metadata server to ask for hosts

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, which compiles for TPUs, is not installed: pip install 'btlm_jax[tpu]'",
)


def tpu_devices(topology: str) -> list:
    """Return the devices of a topology such as "v5e:2x2"."""
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
