# SPDX-License-Identifier: Apache-2.0
"""Dense weights of fewer bits, multiplied by PyTorch: another way than zeros to trade accuracy for bytes.

Their products are right for the matrix that they store, which ``multiplied`` returns: not quite the one they were
given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from flashllm.baselines.baseline import Way
from flashllm.baselines.csr import check_dense
from flashllm.baselines.torch_calls import as_bits, as_tensor, torch, way
from flashllm.errors import ArgumentError

if TYPE_CHECKING:
    from typing_extensions import Self

_LARGEST_FP8 = 448.0  # of e4m3
_FP8_SUMS = 256.0
"""Error limit, times our bound: Hopper's fp8 tensor cores keep fewer bits of a sum than fp32 has, and fewer still with
fast sums. Rows report what was measured: ``max_err_over_bound``."""


@dataclass(frozen=True, kw_only=True)
class TorchInt4:
    """W[M, K] in 4 bits with a bf16 scale for every 128 columns of a row; x and y are bf16."""

    SYSTEM: ClassVar[str] = "torch-int4"
    FORMAT: ClassVar[str] = "int4"
    DTYPE: ClassVar[str] = "bf16"
    GROUP: ClassVar[int] = 128
    INNER_TILES: ClassVar[int] = 8  # k16 tiles that PyTorch packs side by side

    shape: tuple[int, int]
    packed: Any
    scales: Any
    """bf16 [K / 128, M, 2]: a scale and an offset, which is 0."""
    levels: Any
    """int8 [M, K] from -8 to 7, from which ``multiplied`` is made; ``None`` in copies."""

    @property
    def nbytes(self) -> int:
        """Bytes of weights and scales."""
        return int(self.packed.numel() * self.packed.element_size() + self.scales.numel() * 2)

    @classmethod
    def from_dense(cls, dense: Any) -> Self:
        """Round a float16 CuPy array [M, K] to 15 levels of each group's largest magnitude."""
        check_dense(dense)
        rows, columns = dense.shape
        if rows % 8 or columns % cls.GROUP:
            got = f"shape {list(dense.shape)}"
            raise ArgumentError("dense", expected=f"M a multiple of 8, K of {cls.GROUP}, for PyTorch's int4", got=got)
        package = torch()
        groups = as_tensor(dense).view(rows, columns // cls.GROUP, cls.GROUP)
        scale = (groups.abs().amax(dim=2).float() / 7).clamp(min=2.0**-24).to(package.bfloat16)
        levels = package.empty((rows, columns), dtype=package.int8, device="cuda")
        strip = max(1, (1 << 26) // columns)
        for first in range(0, rows, strip):
            part = groups[first : first + strip].float() / scale[first : first + strip, :, None].float()
            levels[first : first + strip] = part.round().clamp(-8, 7).to(package.int8).view(-1, columns)
        unsigned = (levels + 8).to(package.uint8)
        pairs = (unsigned[:, ::2] << 4 | unsigned[:, 1::2]).contiguous()
        packed = package.ops.aten._convert_weight_to_int4pack(pairs, cls.INNER_TILES)
        scales = package.stack((scale, package.zeros_like(scale)), dim=2).transpose(0, 1).contiguous()
        return cls(shape=dense.shape, packed=packed, scales=scales, levels=levels)

    def copy(self) -> Self:
        """The same weight in buffers of its own."""
        return replace(self, packed=self.packed.clone(), scales=self.scales.clone(), levels=None)

    def multiplied(self) -> Any:
        """The matrix that is multiplied: bf16, as uint16 bits [M, K]."""
        import cupy

        package = torch()
        out = cupy.empty(self.shape, dtype=np.uint16)
        rows, columns = self.shape
        strip = max(1, (1 << 26) // columns)
        scales = self.scales[:, :, 0].t()
        for first in range(0, rows, strip):
            levels = self.levels[first : first + strip].view(-1, columns // self.GROUP, self.GROUP)
            wide = levels.to(package.bfloat16) * scales[first : first + strip, :, None]
            out[first : first + strip] = as_bits(wide.view(-1, columns))
        return out

    @classmethod
    def inputs(cls, x: Any) -> Any:
        """x[N, K] as it is multiplied: bf16, as uint16 bits."""
        return as_bits(as_tensor(x).to(torch().bfloat16))

    @classmethod
    def ways(cls, weights: Sequence[Any], x: Any, stream: Any) -> list[Way]:
        """PyTorch has one kernel for it."""
        package = torch()
        x = as_tensor(x).to(package.bfloat16)

        def multiply(copy: int) -> Any:
            w = weights[copy]
            return package.ops.aten._weight_int4pack_mm(x, w.packed, cls.GROUP, w.scales)

        return [way("_weight_int4pack_mm group 128", len(weights), multiply)]


@dataclass(frozen=True, kw_only=True)
class TorchFp8:
    """W[M, K] and x as e4m3 with one scale each, a power of two; x is rounded beforehand, which is not timed."""

    SYSTEM: ClassVar[str] = "torch-fp8"
    FORMAT: ClassVar[str] = "fp8"
    DTYPE: ClassVar[str] = "fp16"

    shape: tuple[int, int]
    values: Any
    scale: Any

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return int(self.values.numel())

    @classmethod
    def from_dense(cls, dense: Any) -> Self:
        """Round a float16 CuPy array [M, K], M and K multiples of 16, on a GPU of compute capability 8.9 or newer."""
        check_dense(dense)
        if dense.shape[0] % 16 or dense.shape[1] % 16:
            got = f"shape {list(dense.shape)}"
            raise ArgumentError("dense", expected="M and K that are multiples of 16, for PyTorch's fp8", got=got)
        values, scale = _to_fp8(as_tensor(dense))
        return cls(shape=dense.shape, values=values, scale=scale)

    def copy(self) -> Self:
        """The same weight in buffers of its own."""
        return replace(self, values=self.values.clone())

    def multiplied(self) -> Any:
        """The matrix that is multiplied, float16, which holds it exactly."""
        return as_bits(self.values.half() * self.scale.half())

    @classmethod
    def inputs(cls, x: Any) -> Any:
        """x[N, K] as it is multiplied, float16, which holds it exactly."""
        values, scale = _to_fp8(as_tensor(x))
        return as_bits(values.half() * scale.half())

    @classmethod
    def ways(cls, weights: Sequence[Any], x: Any, stream: Any) -> list[Way]:
        """cublasLt through PyTorch, with and without its faster, less accurate sums."""
        package = torch()
        values, scale = _to_fp8(as_tensor(x))

        def made(fast: bool) -> Way:
            def multiply(copy: int) -> Any:
                w = weights[copy]
                options = {"out_dtype": package.float16, "use_fast_accum": fast}
                return package._scaled_mm(values, w.values.t(), scale_a=scale, scale_b=w.scale, **options)

            label = f"_scaled_mm{' fast sums' if fast else ''}"
            return way(label, len(weights), multiply, error_limit=_FP8_SUMS)

        return [made(True), made(False)]


def _to_fp8(tensor: Any) -> tuple[Any, Any]:
    """(e4m3 values, float32 scale) of a tensor; the scale is the least power of two that fits its largest magnitude."""
    package = torch()
    scale = (tensor.abs().max().float() / _LARGEST_FP8).clamp(min=2.0**-14).log2().ceil().exp2()
    values = package.empty(tensor.shape, dtype=package.float8_e4m3fn, device="cuda")
    strip = max(1, (1 << 26) // tensor.shape[1])
    for first in range(0, tensor.shape[0], strip):
        part = tensor[first : first + strip].float() / scale
        values[first : first + strip] = part.clamp(-_LARGEST_FP8, _LARGEST_FP8).to(package.float8_e4m3fn)
    return values, scale
