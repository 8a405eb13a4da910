# SPDX-License-Identifier: Apache-2.0
"""The same as ``flashllm figures``."""

from __future__ import annotations

from flashllm.cli.figures import command

if __name__ == "__main__":
    command(prog_name="python3 -m experiments.figures")
