# SPDX-License-Identifier: Apache-2.0
"""Multiplies the operands of a case on a backend, into poisoned and fenced outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashllm.bench import check
from flashllm.errors import CompileError, VerificationError
from flashllm.verify.cases import Case
from flashllm.verify.operands import Problem

_GUARD = 512  # elements of guard on each side of an array
_NAN_BITS = 0x7FDB  # NaN in fp16 and bf16, and not the one that conversions give

Say = Callable[[str], None]
"""Is told what is being done now."""


class Multiplier(Protocol):
    """A backend."""

    def prepare(self, cases: Sequence[Case], say: Say) -> None:
        """Compile what the cases need."""

    def multiply(self, case: Case, problem: Problem) -> NDArray[Any]:
        """y[N, M] of ``problem.x``'s dtype. Raises ``FlashLLMError`` for misbehaviour other than wrong values."""


class ReferenceMultiplier:
    """NumPy."""

    def prepare(self, cases: Sequence[Case], say: Say) -> None:
        """Nothing to do."""

    def multiply(self, case: Case, problem: Problem) -> NDArray[Any]:
        """Multiplies into an output full of NaN."""
        from flashllm.matmul import spmm

        y = np.empty((problem.x.shape[0], problem.w.shape[0]), problem.x.dtype)
        check.poison(y, case.data.dtype)
        spmm(problem.x, problem.w, out=y, backend="reference")
        return y


class EmulatorMultiplier:
    """The kernels on the CPU, one schedule per case."""

    def prepare(self, cases: Sequence[Case], say: Say) -> None:
        """Compile every instance, several into one object."""
        from flashllm.backends import emulator

        for arch in dict.fromkeys(case.arch for case in cases if case.arch):
            specs = dict.fromkeys(case.choice.spec for case in cases if case.arch == arch and case.choice)
            say(f"compiling {len(specs)} kernels for the CPU, as sm_{arch}")
            emulator.preload(specs, build=emulator.BuildOptions(arch=arch))

    def multiply(self, case: Case, problem: Problem) -> NDArray[Any]:
        """The emulator poisons and fences by itself."""
        from flashllm.backends import emulator

        build = emulator.BuildOptions(arch=case.arch or "90a")
        sm_count = case.sm_count or emulator.emulated_device().sm_count
        y, _ = emulator.spmm(
            problem.x, problem.w, choice=case.choice, build=build, seed=case.schedule, sm_count=sm_count
        )
        return y


class CudaMultiplier:
    """The kernels on the current GPU."""

    def prepare(self, cases: Sequence[Case], say: Say) -> None:
        """Compile every instance, in child processes; raises :class:`CompileError` for the first that fails."""
        from flashllm.cpus import cores
        from flashllm.jit.compile import compile_many

        jobs = dict.fromkeys((case.choice.spec, case.arch) for case in cases if case.choice and case.arch)
        say(f"compiling {len(jobs)} kernels")
        for result in compile_many(jobs, workers=cores()):
            if result.error is not None:
                raise CompileError(str(result.error))

    def multiply(self, case: Case, problem: Problem) -> NDArray[Any]:
        """x and y lie between guards; the workspace must come back zero."""
        import cupy

        from flashllm.matmul import plan, spmm

        n, m = problem.x.shape[0], problem.w.shape[0]
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            w = problem.w.to_device()
            _, x = self._fenced(problem.x)
            fence, y = self._fenced(np.full((n, m), _NAN_BITS, np.uint16).view(problem.x.dtype))
            made = plan(w, n, choice=case.choice, **self._device(case))
            workspace = cupy.zeros(max(1, made.workspace_bytes), dtype=cupy.uint8)
            scratch = cupy.empty(max(1, made.scratch_bytes), dtype=cupy.uint8)
            scratch.fill(0xFF)
            stream.synchronize()
            spmm(x, w, out=y, workspace=workspace, scratch=scratch, stream=stream, plan=made)
            stream.synchronize()
        if made.workspace_bytes and workspace.get().any():
            raise VerificationError("the workspace is not zero after the launch")
        result: NDArray[Any] = fence.get()
        for where, guard in (("before", result[:_GUARD]), ("after", result[-_GUARD:])):
            if (guard != _NAN_BITS).any():
                raise VerificationError(f"wrote {where} the output")
        return result[_GUARD:-_GUARD].reshape(n, m).view(problem.x.dtype)

    @staticmethod
    def _device(case: Case) -> dict[str, Any]:
        """This GPU with the multiprocessors that the case asks for."""
        if case.sm_count is None:
            return {}
        from flashllm.device import device_facts

        return {"device": replace(device_facts(), sm_count=case.sm_count)}

    @staticmethod
    def _fenced(array: NDArray[Any]) -> tuple[Any, Any]:
        """``array`` on the GPU between NaNs: all of it as uint16 bits, and the part that holds ``array``."""
        import cupy

        host = np.full(array.size + 2 * _GUARD, _NAN_BITS, np.uint16)
        host[_GUARD:-_GUARD] = np.ascontiguousarray(array).view(np.uint16).ravel()
        whole = cupy.asarray(host)
        part = whole[_GUARD:-_GUARD].reshape(array.shape)
        return whole, part.view(cupy.float16) if array.dtype == np.float16 else part


def multiplier(backend: str) -> Multiplier:
    """The multiplier for ``"cuda"``, ``"emulator"`` or ``"reference"``."""
    if backend == "cuda":
        return CudaMultiplier()
    return EmulatorMultiplier() if backend == "emulator" else ReferenceMultiplier()
