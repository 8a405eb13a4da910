# SPDX-License-Identifier: Apache-2.0
"""Every mutation still finds its text in the source; by default only a few of them are built."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from mutations import Mutation

from flashllm.jit.sources import cuda_root

MODULES = sorted(file.stem for file in Path(__file__).parent.glob("test_*mutations.py"))


def mutations_in(value: object) -> Iterator[Mutation]:
    """The mutations of a list, or of lists by name."""
    if isinstance(value, Mutation):
        yield value
    elif isinstance(value, tuple | list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from mutations_in(one)


@pytest.mark.parametrize("module", MODULES)
def test_the_source_holds_what_is_taken_out(module: str) -> None:
    found = [mutation for value in vars(import_module(module)).values() for mutation in mutations_in(value)]
    assert found
    for mutation in found:
        text = (cuda_root() / mutation.file).read_text(encoding="utf-8")
        assert text.count(mutation.old) == 1, mutation.name
        assert mutation.old != mutation.new, mutation.name
