# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from flashllm.backends import emulator
from flashllm.matmul import tiled_csl


@pytest.fixture(scope="session", autouse=True)
def _compiler() -> None:
    if (reason := emulator.available()) is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def kernels() -> None:
    """Every instance of the product kernel, compiled together: a third of the time of one by one."""
    for arch in ("80", "90a"):
        specs = [spec for spec in dict.fromkeys(tiled_csl.specs()) if spec.supports(arch)]
        emulator.preload(specs, build=emulator.BuildOptions(arch=arch))
