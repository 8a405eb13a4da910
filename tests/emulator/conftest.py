# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest

from flashllm import registry
from flashllm.backends import emulator
from flashllm.io.files import locked
from products import arch_of


@pytest.fixture(scope="session", autouse=True)
def _compiler() -> None:
    if (reason := emulator.available()) is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def kernels() -> None:
    """Every instance of the product kernels, compiled together in a third of the time that one by one takes."""
    specs = list(dict.fromkeys(spec for name in registry.FORMATS for spec in registry.kernel(name).specs()))
    # Another worker may compile the same ones: then all come from the cache.
    with (Path(os.environ["FLASHLLM_TESTS_SCRATCH"]) / "kernels.lock").open("w") as lock, locked(lock.fileno()):
        for arch in ("80", "90a", "120a"):
            chosen = [spec for spec in specs if arch_of(spec) == arch or (arch == "80" and spec.supports("80"))]
            emulator.preload(chosen, build=emulator.BuildOptions(arch=arch))
