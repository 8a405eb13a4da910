# SPDX-License-Identifier: Apache-2.0
"""Time variants of a kernel side by side: the step from an idea to a line in docs/kernels.

Each ``--variant`` is a name and what differs from the default plan of the case::

    python experiments/kernel_variants.py --shape 7168x7168,28672x7168 --n 8,64 --sparsity 0.7,0.8,0.9 \\
        --variant base --variant p0:kPrefetch=0 --variant even:blocks=392,row_cost=0 --variant wgmma:slices=0 \\
        --variant idea:source=spmm/tiled_csl_idea.cu --out rows.json

``--format`` selects the kernel; the examples are for Tiled-CSL. Keys are fields of the choice (``slices``, ``vectors``,
``resident_blocks``, ``blocks_per_sm``, ``overlap``, ``undo``), fields of the split (``blocks``, ``row_cost``), template
parameters of the kernel that correspond to no field (``kPrefetch``), or ``source``, another file below ``cuda/`` with a
kernel of the same name and parameters. All variants of a case are interleaved, L2-cold, in CUDA graphs
(docs/measurement.md), and their outputs are compared with float64: a wrong one is marked ``!``, as expected of a
variant that leaves something out to see what it costs. A variant that spills is left out. The first system of a round
is measured about half a percent slow, so the first variant runs an extra time at the start, unreported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import click

from flashllm import backends
from flashllm.bench.cases import parse_batches, parse_shapes, parse_sparsities, split_list
from flashllm.cli._cases import BadUsage, usage_errors
from flashllm.jit.spec import KernelSpec
from flashllm.matmul import product
from flashllm.matmul.kernel import Split
from flashllm.registry import DEFAULT_FORMAT, FORMATS, kernel, weight_class

_CASE = {"dtype": "T", "n_block": "kN", "aligned": "kAligned"}  # fields of a choice that the case decides
_SPLIT = ("blocks", "row_cost")
_CHECKED_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What differs from the default plan."""

    name: str
    choice: dict[str, int | bool] = field(default_factory=dict)
    split: dict[str, int] = field(default_factory=dict)
    template: dict[str, str] = field(default_factory=dict)
    source: str | None = None

    def plan(self, w: Any, n: int, *, arch: str, sm_count: int) -> tuple[KernelSpec, Split]:
        """Kernel and split for ``n`` columns of x. Raises :class:`ArgumentError` where they make no sense."""
        module: Any = kernel(w.format)
        choice = replace(module.default_choice(w, n, arch=arch), **self.choice)
        split = replace(module.split_for(w, n, choice, sm_count=sm_count), **self.split)
        spec = choice.spec
        unknown = self.template.keys() - dict(spec.template).keys()
        if unknown:
            raise BadUsage(f"--variant {self.name}: the kernel has no template parameter {min(unknown)!r}")
        template = tuple((key, self.template.get(key, text)) for key, text in spec.template)
        return replace(spec, template=template, source=self.source or spec.source, archs=(arch,)), split


def parse_variant(text: str, format_name: str = DEFAULT_FORMAT) -> Variant:
    """``"even:blocks=392,row_cost=0"`` -> a :class:`Variant`; :class:`BadUsage` names anything unknown."""
    flags = {f.name: f.type == "bool" for f in fields(kernel(format_name).Choice) if f.name not in _CASE}
    # Shared memory, grid and workspace follow from the choice, so parameters that stand for its fields are not changed.
    fixed = {*_CASE.values(), *("k" + name.title().replace("_", "") for name in flags)}
    name, _, rest = text.partition(":")
    if not name:
        raise BadUsage(f"--variant: expected NAME or NAME:KEY=VALUE,..., got {text!r}")
    variant = Variant(name=name)
    for part in split_list(rest):
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise BadUsage(f"--variant {name}: expected KEY=VALUE, got {part!r}")
        if key in fixed:
            raise BadUsage(f"--variant {name}: {key} follows from the case and the choice, got {part!r}")
        if key == "source":
            variant = replace(variant, source=value)
        elif key.startswith("k") and key[1:2].isupper():
            variant.template[key] = value
        elif key in _SPLIT:
            variant.split[key] = _number(name, key, value)
        elif key in flags:
            variant.choice[key] = bool(_number(name, key, value)) if flags[key] else _number(name, key, value)
        else:
            known = ", ".join((*flags, *_SPLIT, "source"))
            raise BadUsage(f"--variant {name}: expected {known} or a template parameter, got {key!r}")
    return variant


def _number(name: str, key: str, value: str) -> int:
    if not value.isdecimal():
        raise BadUsage(f"--variant {name}: {key}: expected a number (0 or 1 for a flag), got {value!r}")
    return int(value)


class System:
    """One variant on the weight copies of a case."""

    def __init__(self, spec: KernelSpec, split: Split, weights: Sequence[Any], x: Any) -> None:
        import cupy

        from flashllm.bench.systems import empty_output

        self.spec, self.split, self.weights, self.x = spec, split, weights, x
        self.copies = len(weights)
        self.y = empty_output(x.shape[0], weights[0].shape[0], weights[0].dtype)
        self._workspace = cupy.zeros(max(split.workspace_bytes, 16), cupy.uint8)
        self._scratch = cupy.empty(max(split.scratch_bytes, 16), cupy.uint8)

    def launch(self, copy: int, stream: Any) -> None:
        """Queue one product; allocates nothing."""
        memory = (self._workspace, self._scratch)
        product.launch(self.weights[copy], self.spec, self.split, self.x, self.y, *memory, stream=stream)


Plans = dict[str, tuple[KernelSpec, Split]]


def build(variants: Sequence[Variant], w: Any, batches: Sequence[int], *, arch: str, sm_count: int) -> dict[int, Plans]:
    """For every N the variants by name, compiled; those that spill are left out, with a line on stderr."""
    from flashllm.jit.compile import compile_many

    plans = {n: {v.name: v.plan(w, n, arch=arch, sm_count=sm_count) for v in variants} for n in batches}
    jobs = [(n, name, spec) for n, named in plans.items() for name, (spec, _) in named.items()]
    built = compile_many([(spec, arch) for _, _, spec in jobs], workers=os.cpu_count() or 1, allow_spills=True)
    for (n, name, _), result in zip(jobs, built, strict=True):
        if result.cubin is None:
            raise BadUsage(f"--variant {name}: {result.error}")
        if result.cubin.resources.uses_local_memory:
            click.echo(f"{name}, N={n}: left out, {result.cubin.resources.describe_local()}", err=True)
            del plans[n][name]
    return plans


def measure(
    shape: tuple[int, int],
    sparsity: float,
    batches: Sequence[int],
    variants: Sequence[Variant],
    *,
    format_name: str,
    cap_s: float,
) -> list[dict[str, Any]]:
    """Rows of one weight: for every N, each variant's median and whether its output was right."""
    import cupy
    import numpy as np

    from flashllm.bench import data, timing
    from flashllm.bench.check import error_over_bound, make_reference, sample_rows
    from flashllm.bench.systems import rotation
    from flashllm.device import device_facts

    facts = device_facts()
    stream = cupy.cuda.Stream(non_blocking=True)
    method = timing.Method(cap_s=cap_s)
    rows = []
    with stream:
        dense = data.random_matrix(*shape, density=1 - sparsity, std=shape[1] ** -0.5, device=True)
        sampled = sample_rows(shape[0], _CHECKED_ROWS, 0)
        dense64 = dense[cupy.asarray(sampled)].get().astype(np.float64)
        w = weight_class(format_name).from_dense(dense)
        del dense
        weights = rotation(w, timing.rotation_copies(w.nbytes, facts.l2_bytes, "cold"))
        for n, plans in build(variants, w, batches, arch=facts.arch, sm_count=facts.sm_count).items():
            if not plans:
                continue
            x = data.random_matrix(n, shape[1], seed=n, device=True)
            reference = make_reference(x.get().astype(np.float64), dense64, sampled, w.dtype)
            systems = [System(spec, split, weights, x) for spec, split in plans.values()]
            timings = timing.measure([systems[0], *systems], method, stream=stream)[1:]
            for name, system, timed in zip(plans, systems, timings, strict=True):
                system.y.fill(float("nan"))
                system.launch(0, stream)
                error = error_over_bound(system.y.get().astype(np.float64), reference)
                case = {"variant": name, "format": format_name, "M": shape[0], "K": shape[1], "N": n}
                case["sparsity"] = sparsity
                rows.append({**case, "median_us": round(timed.median_us, 3), "right": bool(error <= 1.0)})
    return rows


def line(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of one case as text: times, and differences from the first."""
    first = rows[0]
    base = first["median_us"]
    texts = [
        f"{row['variant']}{'' if row['right'] else '!'} {row['median_us']:.2f}"
        + ("" if row is first else f" ({100 * (row['median_us'] / base - 1):+.1f} %)")
        for row in rows
    ]
    return f"{first['M']}x{first['K']} N={first['N']} {first['sparsity']:g}: " + "  ".join(texts)


@click.command()
@click.option("--shape", "shapes", multiple=True, required=True, metavar="MxK,...", help="Weight shapes.")
@click.option("--n", "batches", default="8,16,32,64", show_default=True, metavar="N,...", help="Batch sizes.")
@click.option("--sparsity", default="0.7,0.8,0.9", show_default=True, metavar="S,...", help="Fractions of zeros.")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(list(FORMATS)),
    default=DEFAULT_FORMAT,
    show_default=True,
    help="Whose kernel.",
)
@click.option("--variant", "texts", multiple=True, default=("base",), metavar="NAME[:KEY=VALUE,...]", help="See above.")
@click.option("--time-cap", default=0.08, show_default=True, help="GPU seconds per variant and case.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the rows as JSON.")
def main(
    shapes: tuple[str, ...],
    batches: str,
    sparsity: str,
    format_name: str,
    texts: tuple[str, ...],
    time_cap: float,
    out: Path | None,
) -> None:
    """Time variants of a kernel side by side on this GPU."""
    variants = [parse_variant(text, format_name) for text in texts]
    if len({variant.name for variant in variants}) < len(variants):
        raise BadUsage("--variant: expected a name of its own for each")
    rows: list[dict[str, Any]] = []
    with usage_errors():
        backends.select("cuda")
        cases = [(shape, s) for shape in parse_shapes(shapes) for s in parse_sparsities(sparsity)]
        for shape, s in cases:
            new = measure(shape, s, parse_batches(batches), variants, format_name=format_name, cap_s=time_cap)
            for n in dict.fromkeys(row["N"] for row in new):
                click.echo(line([row for row in new if row["N"] == n]))
            rows += new
    if out is not None:
        out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
