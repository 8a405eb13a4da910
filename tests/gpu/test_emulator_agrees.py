# SPDX-License-Identifier: Apache-2.0
"""The same instance on this GPU and on the CPU emulator gives equal bits on integer operands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flashllm import plan, registry, spmm
from flashllm.backends import emulator
from flashllm.device import device_facts
from products import choice_of, integers, packed_for, weight

SPECS = tuple(dict.fromkeys(spec for name in registry.FORMATS for spec in registry.kernel(name).specs()))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_equal_bits(cp: Any, spec: Any) -> None:
    arch = device_facts().arch
    if (reason := emulator.available()) is not None:
        pytest.skip(f"gpu alone: {reason}")
    if not spec.supports(arch):
        pytest.skip(f"no path for {arch} on this gpu")
    choice = choice_of(spec)
    shape = (264, 520) if choice.aligned else (263, 519)
    for seed, (pattern, density) in enumerate((("uniform", 0.15), ("skewed", 0.4), ("empty-tiles", 0.9))):
        _, host = packed_for(spec, weight(pattern, shape, density, choice.dtype, seed=seed))
        x = integers(np.random.default_rng(seed), (choice.n_block, shape[1]), choice.dtype)
        emulated, _ = emulator.spmm(x, host, choice=choice, arch=arch, seed=seed)
        device = host.to_device()
        bits = cp.asarray(x.view(np.uint16))
        operand = bits.view(np.float16) if choice.dtype == "fp16" else bits
        got = spmm(operand, device, plan=plan(device, len(x), choice=choice)).get()
        np.testing.assert_array_equal(got.view(np.uint16), emulated.view(np.uint16))
