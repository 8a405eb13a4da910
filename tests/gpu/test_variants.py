# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from scripts import load_script


def test_variants_are_timed_and_checked(cp: Any, tmp_path: Path) -> None:
    main = load_script("kernel_variants").main
    rows = tmp_path / "rows.json"
    arguments = ["--shape", "4736x7680", "--n", "8,64", "--sparsity", "0.8", "--time-cap", "0.02", "--out", str(rows)]
    variants = ["--variant", "base", "--variant", "flat:row_cost=0", "--variant", "p0:kPrefetch=0"]
    done = CliRunner().invoke(main, [*arguments, *variants])
    assert done.exit_code == 0, done.output
    written = json.loads(rows.read_text(encoding="utf-8"))
    assert [(row["N"], row["variant"]) for row in written] == [
        (n, name) for n in (8, 64) for name in ("base", "flat", "p0")
    ]
    assert all(row["right"] and row["median_us"] > 0 for row in written)
    assert "4736x7680 N=8 0.8: base" in done.output
