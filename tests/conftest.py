"""Eight host devices, exact matrix products, and no silent rank promotion in every test.

Programs are compiled without LLVM's optimisations and, for the CPU, without XLA's newer way to emit fusions, which are most of what
the tests would wait for; notebooks and the main job of `.ci/run` have both. What one process of a test run has compiled, the others
read.
"""

import atexit
import os
import shutil
import tempfile

from tests.xla_flags import known

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    for flag, value in {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_parallel_codegen_split_count": "1"}.items():
        if known(flag):
            os.environ["XLA_FLAGS"] += f" --{flag}={value}"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Workers and the commands that tests start find it set.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lcx-tests-")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest

from lcx.core import host

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.devices()  # there are eight from here on, whatever a command that a test runs in its process asks for


@pytest.fixture(scope="session", autouse=True)
def no_units():
    """Numbers are those of most CPUs, without units for bfloat16; commands in processes of their own take what there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "multiplies_bfloat16", lambda: False)
        yield


@pytest.fixture(scope="session")
def devices():
    """The host devices that the tests may build meshes from."""
    return jax.devices()
