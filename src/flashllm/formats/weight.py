# SPDX-License-Identifier: Apache-2.0
"""The base class of sparse weights: what follows from a format's buffers and fields alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flashllm.errors import FormatError, MissingDependencyError
from flashllm.formats.base import DType, ReportCallback
from flashllm.formats.sources import is_cupy

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseWeight(ABC):
    """A weight matrix W [M, K] with most elements pruned, as some format stores it.

    Buffers are NumPy arrays on the host or CuPy arrays on a device, all on the same side. Encoding is exact: every
    stored element keeps its row, column and bit pattern. +0.0, -0.0 and explicit zeros of a sparse source are pruned;
    NaN and infinity are stored.

    A format is a frozen dataclass that derives from this one, names its buffers in ``BUFFERS`` and has a field for
    each; its other fields are scalars or tuples of integers, which JSON can hold. The constructor calls
    ``check_structure``, which does not look into the buffers; ``validate()`` checks the content too.
    """

    FORMAT: ClassVar[str]
    """Name of the format, e.g. ``"tiled-csl"``."""
    VERSION: ClassVar[int] = 1
    """Version of the format, which changes when the same buffers would mean something else. Files record it, and files
    of another version are refused."""
    BUFFERS: ClassVar[tuple[str, ...]]
    """Names of the buffers, in the order of ``arrays()``."""
    ENCODINGS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}
    """Named sets of options of ``from_dense`` that give different legal encodings of a matrix."""
    LAYOUT: ClassVar[tuple[str, ...]] = ()
    """Fields that a kernel is compiled for: its choices have them too, and ``from_dense`` takes them as options."""
    MULTIPLIES_ZEROS: ClassVar[bool] = True
    """Whether a product multiplies every pruned zero, so that 0 * infinity and 0 * NaN of x are NaN, as in a dense
    product. Where ``False`` it may leave any of them out; for finite x that makes no difference."""

    shape: tuple[int, int]
    """(M, K): output features, input features."""
    dtype: DType
    """Type of the stored values."""
    nnz: int
    """Stored elements, padding not counted."""

    def __post_init__(self) -> None:
        self._check(None)

    @classmethod
    @abstractmethod
    def check_structure(cls, fields: Mapping[str, Any], arrays: Mapping[str, Any], *, path: str | None) -> None:
        """Raise ``FormatError`` unless the fields have legal types and ranges and the buffers fit them.

        ``fields`` may come from a file and hold anything (``shape`` may be a list). This checks the types and lengths
        of the buffers, not their content. ``path`` is for messages.
        """

    @abstractmethod
    def check_content(self, *, path: str | None) -> None:
        """Raise ``FormatError`` at the first breach in the content of the buffers, which are on the host here."""

    @classmethod
    @abstractmethod
    def estimated_bytes(cls, shape: tuple[int, int], density: float) -> int:
        """About the most bytes that a weight [M, K] takes with a fraction ``density`` stored at random places."""

    @classmethod
    def densest(cls, **layout: int) -> float:
        """About the highest density of random masks that these options of ``LAYOUT`` can encode; 1: any mask."""
        return 1.0

    @classmethod
    @abstractmethod
    def from_dense(cls, a: Any, *, dtype: str | None = None, report: ReportCallback | None = None) -> Self:
        """Encode a dense matrix [M, K]: NumPy on the host, CuPy on its device.

        ``dtype`` is ``"fp16"`` or ``"bf16"``, by default bf16 for bf16 input, else fp16. Other types are rounded to
        nearest even; ``report`` is called once with the resulting ``RoundingReport``. Raises ``ArgumentError``.
        """

    @classmethod
    @abstractmethod
    def from_scipy(cls, s: Any, *, dtype: str = "fp16", report: ReportCallback | None = None) -> Self:
        """Encode a CSR, CSC or COO ``scipy.sparse`` matrix or array [M, K]; duplicates are summed."""

    @abstractmethod
    def to_dense(self) -> Any:
        """Dense matrix [M, K], on the host or the device that holds the buffers."""

    @abstractmethod
    def to_scipy(self) -> Any:
        """``scipy.sparse.csr_array`` [M, K] of float32 (SciPy has no 16-bit floats)."""

    @property
    def format(self) -> str:
        """Name of the format, e.g. ``"tiled-csl"``."""
        return self.FORMAT

    @property
    def density(self) -> float:
        """``nnz / (M * K)``."""
        return self.nnz / (self.shape[0] * self.shape[1])

    @property
    def sparsity(self) -> float:
        """``1 - density``."""
        return 1.0 - self.density

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(int(array.nbytes) for array in self.arrays().values())

    @property
    def bytes_per_element(self) -> float:
        """``nbytes / (M * K)``; a dense fp16 matrix has 2."""
        return self.nbytes / (self.shape[0] * self.shape[1])

    @property
    def is_device(self) -> bool:
        """True when the buffers are CuPy arrays."""
        return is_cupy(getattr(self, self.BUFFERS[0]))

    def arrays(self) -> dict[str, Any]:
        """The buffers by name."""
        return {name: getattr(self, name) for name in self.BUFFERS}

    def metadata(self) -> dict[str, Any]:
        """All that is needed besides the buffers to rebuild the weight; values fit JSON."""
        values = ((name, getattr(self, name)) for name in self._field_names())
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values}

    @classmethod
    def from_parts(cls, metadata: Mapping[str, Any], arrays: Mapping[str, Any], *, path: str | None = None) -> Self:
        """A weight from ``metadata()`` and ``arrays()``, or ``FormatError``; ``path`` is for messages.

        Fields with a default may be missing: older files do not have them.
        """
        metadata = {**cls._defaults(), **metadata}
        for name in cls._field_names():
            if name not in metadata:
                raise FormatError(field=name, expected="an entry in the metadata", got="none", path=path)
        for name in cls.BUFFERS:
            if name not in arrays:
                raise FormatError(field=name, expected="a buffer", got="none", path=path)
        scalars = {name: metadata[name] for name in cls._field_names()}
        buffers = {name: arrays[name] for name in cls.BUFFERS}
        cls.check_structure(scalars, buffers, path=path)
        whole: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in scalars.items()
        }
        return cls(**whole, **buffers)

    def validate(self, *, path: str | None = None) -> None:
        """Check every invariant; ``FormatError`` names the field and index, what was expected and what was found.

        Takes time linear in the size of the weight, on the host: device buffers are copied there. ``path`` is for
        messages.
        """
        self._check(path)
        self.to_host().check_content(path=path)

    def to_device(self) -> Self:
        """The same weight on the current CUDA device (itself if it is there already).

        Raises ``MissingDependencyError`` without a usable GPU, ``DeviceMemoryError`` if the weight does not fit.
        """
        from flashllm.device import current_device, gpu_problem, memory_errors

        if (problem := gpu_problem()) is not None:
            raise MissingDependencyError(f"to_device: {problem}; see `flashllm doctor`")
        import cupy

        current = current_device()
        if self.is_device and all(int(array.device.id) == current for array in self.arrays().values()):
            return self
        with memory_errors("weight", self.nbytes):
            return self.with_arrays({name: cupy.asarray(array) for name, array in self.arrays().items()})

    def to_host(self) -> Self:
        """The same weight with NumPy buffers (itself if it has them already)."""
        if not self.is_device:
            return self
        return self.with_arrays({name: array.get() for name, array in self.arrays().items()})

    def copy(self) -> Self:
        """The same weight in buffers of its own, on the same side, host or device."""
        return self.with_arrays({name: array.copy() for name, array in self.arrays().items()})

    def with_arrays(self, arrays: Mapping[str, Any]) -> Self:
        """The same weight with other arrays of the same content; ``arrays`` is by buffer name."""
        return replace(self, **arrays)

    def save(self, path: str | Path, *, name: str = "weight") -> None:
        """Write a safetensors file that holds this weight under ``name``; see ``flashllm.io.container``."""
        from flashllm.io.container import save_weights

        save_weights(path, {name: self})

    @classmethod
    def load(cls, path: str | Path, *, name: str | None = None, validate: bool = True) -> Self:
        """Read a weight of this format from a file that ``save`` wrote; see ``flashllm.io.container.load_weight``."""
        from flashllm.io.container import load_weight

        weight = load_weight(path, name=name, validate=validate)
        if not isinstance(weight, cls):
            raise FormatError(field="format", expected=cls.FORMAT, got=weight.format, path=str(path))
        return weight

    @classmethod
    def _field_names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls) if field.name not in cls.BUFFERS)

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        return {field.name: field.default for field in fields(cls) if field.default is not MISSING}

    def _check(self, path: str | None) -> None:
        arrays = self.arrays()
        self.check_structure({name: getattr(self, name) for name in self._field_names()}, arrays, path=path)
        first, *others = self.BUFFERS
        for name in others:
            if is_cupy(arrays[name]) != is_cupy(arrays[first]):
                raise FormatError(field=name, expected=f"on the side of {first}", got="host and device", path=path)
