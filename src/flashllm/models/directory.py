# SPDX-License-Identifier: Apache-2.0
"""The files beside the weights in a Hugging Face directory: the configuration, and what reads and writes text."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from flashllm.errors import FormatError, MissingDependencyError
from flashllm.formats.base import DType
from flashllm.io.checkpoint import Checkpoint
from flashllm.io.files import copy_file, write_text
from flashllm.io.hf_directory import CONFIG_NAME, TOKENIZER_NAME
from flashllm.models.tokenizer import has_own_tokenizer, load_tokenizer

_TYPE_NAMES: Mapping[DType, str] = {"fp16": "float16", "bf16": "bfloat16"}
_TYPE_KEYS = ("torch_dtype", "dtype")
"""Entries of ``config.json`` for the type of the tensors: older files have the first, newer ones the second."""


def companion_names(checkpoint: Checkpoint) -> set[str]:
    """Names of the files that :func:`write_companions` may write."""
    return {*checkpoint.companions(), *([TOKENIZER_NAME] if has_own_tokenizer(checkpoint) else [])}


def write_companions(checkpoint: Checkpoint, directory: Path, *, without: Collection[str] = ()) -> None:
    """Copy the files beside the weights, except names in ``without``, each completely or not at all.

    The tokenizer in a GGUF file becomes ``tokenizer.json`` if it can be read and the package ``tokenizers`` is
    installed; if not, it is left out, since the weights are just as usable without it. Raises ``FormatError`` for a
    file that is not a regular one, and ``OSError``.
    """
    for name, path in checkpoint.companions().items():
        if name not in without:
            copy_file(path, directory / name)
    if has_own_tokenizer(checkpoint):
        with suppress(MissingDependencyError, FormatError):
            write_text(directory / TOKENIZER_NAME, load_tokenizer(checkpoint).to_json())


def config_text(config: Mapping[str, Any]) -> str:
    """The content of ``config.json``."""
    return json.dumps(dict(config), indent=2) + "\n"


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.json``, completely or not at all."""
    write_text(directory / CONFIG_NAME, config_text(config))


def with_type(config: Mapping[str, Any], dtype: DType) -> dict[str, Any]:
    """``config`` with its type entries set to ``dtype``."""
    keys = [key for key in _TYPE_KEYS if key in config] or [_TYPE_KEYS[0]]
    return {**config, **dict.fromkeys(keys, _TYPE_NAMES[dtype])}
