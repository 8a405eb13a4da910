# SPDX-License-Identifier: Apache-2.0
"""Shared set-up: private caches, GPU tests skipped where there is no GPU."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Set before anything imports CuPy: it creates its cache folder on import and fails where it cannot. Workers of
# pytest-xdist share the folder of the process that starts them, so what one has compiled, the others need not.
if "FLASHLLM_TESTS_SCRATCH" not in os.environ:
    os.environ["FLASHLLM_TESTS_SCRATCH"] = tempfile.mkdtemp(prefix="flashllm-tests-")
    atexit.register(shutil.rmtree, os.environ["FLASHLLM_TESTS_SCRATCH"], ignore_errors=True)
_SCRATCH = Path(os.environ["FLASHLLM_TESTS_SCRATCH"])
os.environ["CUPY_CACHE_DIR"] = str(_SCRATCH / "cupy")
os.environ["FLASHLLM_CACHE_DIR"] = str(_SCRATCH / "flashllm")

# Also before anything imports NumPy: workers share the cores, and there the threads of a product, which wait for one
# another, take many times as long as one thread for all of it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Programs that tests start must find the package too, even when it is not installed.
_TESTS = Path(__file__).resolve().parent
_SOURCE = str(_TESTS.parent / "src")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_SOURCE, os.environ.get("PYTHONPATH")]))


def _problem() -> str | None:
    from flashllm.device import gpu_problem

    return gpu_problem()


def pytest_report_header() -> str:
    problem = _problem()
    return f"GPU: none, GPU tests are skipped: {problem}" if problem else "GPU: usable"


@pytest.hookimpl(tryfirst=True)  # before -m selects by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == _TESTS / "gpu" or item.get_closest_marker("sanitize"):
            item.add_marker(pytest.mark.gpu)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    problem = _problem()
    if problem is None:
        return
    if os.environ.get("FLASHLLM_REQUIRE_GPU") == "1":
        raise pytest.UsageError(f"these tests need a GPU: {problem}")
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason="no usable GPU"))


@pytest.fixture(scope="session")
def _cupy_session() -> Any:
    cupy = pytest.importorskip("cupy")
    if os.environ.get("FLASHLLM_NO_POOL") == "1":
        # Under compute-sanitizer: a pool hides accesses past the end of an array.
        cupy.cuda.set_allocator(None)
        cupy.cuda.set_pinned_memory_allocator(None)
    return cupy


@pytest.fixture
def cp(_cupy_session: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The ``cupy`` module on a machine with a usable GPU; the GPU is idle before and after the test."""
    if request.node.get_closest_marker("gpu") is None and (problem := _problem()) is not None:
        pytest.skip(f"no GPU: {problem}")
    yield _cupy_session
    _cupy_session.cuda.Device().synchronize()
