# SPDX-License-Identifier: Apache-2.0
"""``python -m flashllm``."""

from __future__ import annotations

from flashllm.cli.main import main

if __name__ == "__main__":
    main()
