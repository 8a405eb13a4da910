# SPDX-License-Identifier: Apache-2.0
"""What the host module of a kernel offers: all that planning, launching, tuning, verifying and measuring use of it.

A module such as ``matmul/tiled_csl.py`` fulfils :class:`Kernel` as it is: its functions and its class ``Choice`` are
the members. ``flashllm.registry`` finds the module for a weight. One launch computes a product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from flashllm.jit.spec import KernelSpec


class KernelChoice(Protocol):
    """One compiled instance and how it is spread over the device: what the heuristic, the tuner or a caller decides.

    A hashable frozen dataclass whose fields are of type ``int``, ``bool`` or ``str``, so that a file can hold it. All
    attributes here except ``spec`` are fields; a kernel adds its own, and those that its weights name in ``LAYOUT``,
    which planning sets to the weight's values.
    """

    @property
    def dtype(self) -> str:
        """``"fp16"`` or ``"bf16"``; planning sets it to the weight's."""

    @property
    def n_block(self) -> int:
        """Columns of x that one block computes."""

    @property
    def aligned(self) -> bool:
        """K is a multiple of 8, so rows of x start 16-byte aligned; planning sets it."""

    @property
    def spec(self) -> KernelSpec:
        """The compiled instance."""


class Split(Protocol):
    """How one product is dealt to blocks; :class:`~flashllm.matmul.stream_k.StreamK` is one."""

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks along the tiles of W and along N."""

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the workspace, which is zero before and after every launch; 0: none needed."""

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch memory, which may hold anything before and after every launch; 0: none needed."""


class Kernel(Protocol):
    """Members of a kernel's host module. ``w`` is a weight of its format, ``n`` the rows of x, ``choice`` and ``split``
    are of the module's own types.
    """

    @property
    def Choice(self) -> type[Any]:
        """The class of its choices, a :class:`KernelChoice`."""

    def default_choice(self, w: Any, n: int, *, arch: str) -> KernelChoice:
        """The heuristic's choice for ``n`` columns of x on ``arch``."""

    def split_for(self, w: Any, n: int, choice: Any, *, sm_count: int) -> Split:
        """Blocks and workspace of ``choice`` on ``sm_count`` multiprocessors."""

    def reason(self, w: Any, choice: Any, split: Any, *, sm_count: int) -> str:
        """One line for people on what was chosen and why."""

    def arguments(self, w: Any, split: Any, x: Any, out: Any, workspace: Any, scratch: Any) -> tuple[Any, ...]:
        """The kernel's arguments in the order of its parameters: arrays (NumPy or CuPy) and NumPy scalars.

        x is [N, K]; ``workspace`` and ``scratch`` are arrays at valid addresses even where none are needed.
        """

    def candidates(self, w: Any, n: int, *, arch: str) -> Iterator[KernelChoice]:
        """Choices worth measuring, the heuristic's first, none twice; the spec of each is among :meth:`specs`."""

    def tune_key(self, w: Any, n: int) -> str:
        """What a measured choice is valid for besides format, dtype and shape: a class of density and of ``n``."""

    def usable(self, choice: Any) -> bool:
        """Whether a choice that comes from a file may be launched; its fields have the right types."""

    def instances(self) -> Sequence[KernelChoice]:
        """One choice for every instance that a plan, the tuner or the ablation can request."""

    def typical(self, arch: str) -> Sequence[KernelChoice]:
        """The instances that the heuristic takes most often on ``arch``, for every width, dtype and alignment."""

    def ablation(self, choice: Any) -> Mapping[str, KernelChoice]:
        """Variants of ``choice`` that lack one idea each, by name; empty where no such instances exist."""

    def specs(self) -> Sequence[KernelSpec]:
        """The compiled kernels of :meth:`instances`."""
