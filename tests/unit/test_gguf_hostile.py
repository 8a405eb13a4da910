# SPDX-License-Identifier: Apache-2.0
"""GGUF files made to do harm: only errors of the package are raised, and no memory is wasted."""

from __future__ import annotations

import math
import os
import random
import struct
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashllm.errors import ArgumentError, FormatError
from flashllm.io import gguf_header
from flashllm.io.gguf_file import GgufCheckpoint

U8, I8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 1, 4, 6, 7, 8, 9, 10
HUGE = (2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
HIDDEN, HEADS, FF, VOCAB = 8, 2, 16, 6


def string(text: str | bytes, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def u32(key: str, value: int) -> bytes:
    return entry(key, U32, struct.pack("<I", value))


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + content


def described(name: str | bytes, dims: list[int], offset: int, kind: int = 0, rank: int | None = None) -> bytes:
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims) if rank is None else rank, *dims)
    return string(name) + sizes + struct.pack("<IQ", kind, offset)


ENTRIES = [
    entry("general.architecture", STRING, string("llama")),
    *(u32(f"llama.{key}", value) for key, value in (
        ("context_length", 16), ("embedding_length", HIDDEN), ("block_count", 1), ("feed_forward_length", FF),
        ("attention.head_count", HEADS), ("attention.head_count_kv", 1))),
    entry("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", 1e-5)),
    entry("tokenizer.ggml.tokens", ARRAY, array(STRING, VOCAB, b"".join(map(string, "abcdeΣ")))),
    entry("tokenizer.ggml.token_type", ARRAY, array(U8, 3, b"\x01\x02\x03")),
    entry("tokenizer.ggml.add_bos_token", BOOL, b"\x01"),
]  # fmt: skip
SHAPES = {
    "token_embd.weight": [HIDDEN, VOCAB],
    "blk.0.attn_norm.weight": [HIDDEN],
    "blk.0.attn_q.weight": [HIDDEN, HIDDEN],
    "blk.0.attn_k.weight": [HIDDEN, HIDDEN // HEADS],
    "blk.0.ffn_up.weight": [HIDDEN, FF],
}


def tensors() -> list[bytes]:
    out, offset = [], 0
    for name, dims in SHAPES.items():
        out.append(described(name, dims, offset))
        offset += math.prod(dims) * 4
        offset += -offset % 32
    return out


def file(
    entries: list[bytes] | None = None, infos: list[bytes] | None = None, *, magic: bytes = b"GGUF", version: int = 3,
    entry_count: int | None = None, tensor_count: int | None = None, data: int = 4096,
) -> bytes:  # fmt: skip
    entries = ENTRIES if entries is None else entries
    infos = tensors() if infos is None else infos
    head = magic + struct.pack(
        "<IQQ", version, len(infos) if tensor_count is None else tensor_count,
        len(entries) if entry_count is None else entry_count,
    )  # fmt: skip
    head += b"".join(entries) + b"".join(infos)
    return head + b"\0" * (-len(head) % 32) + np.arange(data // 4, dtype=np.float32).tobytes()


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """No case takes more memory or time than a small file can need."""
    tracemalloc.start()
    began = time.perf_counter()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    assert time.perf_counter() - began < 60


def open_and_read(path: Path, content: bytes) -> int:
    """How many tensors could be read."""
    path.write_bytes(content)
    with GgufCheckpoint(path) as checkpoint:
        for name, info in checkpoint.tensors.items():
            assert checkpoint.read(name).shape == info.shape
        return len(checkpoint.tensors)


def refused(path: Path, content: bytes) -> FormatError:
    with pytest.raises(FormatError) as caught:
        open_and_read(path, content)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 5000
    assert "\n" not in str(caught.value)
    return caught.value


def test_the_sound_file(tmp_path: Path) -> None:
    assert open_and_read(tmp_path / "m.gguf", file()) == len(SHAPES)
    assert open_and_read(tmp_path / "m.gguf", file(version=2)) == len(SHAPES)
    with GgufCheckpoint(tmp_path / "m.gguf") as checkpoint:
        assert checkpoint.tokenizer["tokens"] == ("a", "b", "c", "d", "e", "Σ")
        assert checkpoint.tokenizer["add_bos_token"] is True
        start = VOCAB * HIDDEN + HIDDEN + -(VOCAB * HIDDEN) % 8
        q = np.arange(start, start + HIDDEN * HIDDEN, dtype=np.float32).reshape(HIDDEN, HIDDEN)
        assert np.array_equal(checkpoint.read("model.layers.0.self_attn.q_proj.weight"), q[[0, 2, 1, 3, 4, 6, 5, 7]])


def test_truncated(tmp_path: Path) -> None:
    last = SHAPES["blk.0.ffn_up.weight"]
    whole = file(data=4096)
    end = len(whole) - 4096 + struct.unpack("<Q", tensors()[-1][-8:])[0] + math.prod(last) * 4
    assert open_and_read(tmp_path / "m.gguf", whole[:end]) == len(SHAPES)
    for stop in (*range(64), *range(64, end, 11), end - 1):
        refused(tmp_path / "m.gguf", whole[:stop])


def test_every_byte_changed(tmp_path: Path) -> None:
    """Whatever is read then has the shape that is claimed, or the file is refused."""
    whole = file()
    header = len(whole) - 4096
    rng = random.Random(20260102)
    outcomes = {"read": 0, "refused": 0}
    for position in range(header):
        changed = bytearray(whole)
        changed[position] = rng.choice([0, 0xFF, whole[position] ^ 0x80, whole[position] ^ 1, rng.randrange(256)])
        outcomes[attempt(tmp_path / "m.gguf", bytes(changed))] += 1
    assert min(outcomes.values()) > 100, outcomes


def test_random_damage(tmp_path: Path) -> None:
    whole = file()
    header = len(whole) - 4096
    rng = random.Random(20260103)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(600):
        changed = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            position = rng.randrange(header)
            kind = rng.randrange(4)
            if kind == 0:  # a number of 8 bytes
                changed[position : position + 8] = struct.pack("<Q", rng.choice([0, 1, 2**20, *HUGE]))
            elif kind == 1:  # one of 4
                changed[position : position + 4] = struct.pack("<I", rng.choice([0, 9, 255, 2**31, 2**32 - 1]))
            elif kind == 2:
                del changed[position : position + rng.randrange(1, 40)]
            else:
                changed[position:position] = changed[rng.randrange(header) :][: rng.randrange(1, 40)]
        outcomes[attempt(tmp_path / "m.gguf", bytes(changed))] += 1
    assert outcomes["refused"] > 400


def attempt(path: Path, content: bytes) -> str:
    try:
        open_and_read(path, content)
    except (FormatError, ArgumentError, OSError):
        return "refused"
    return "read"


LIES = {
    "tensor count": lambda n: file(tensor_count=n),
    "metadata count": lambda n: file(entry_count=n),
    "metadata[0].key": lambda n: file([string("k", n)]),
    "k": lambda n: file([entry("k", STRING, string("v", n))]),
    "k: numbers": lambda n: file([entry("k", ARRAY, array(U32, n, b"abcd"))]),
    "k: strings": lambda n: file([entry("k", ARRAY, array(STRING, n, string("a")))]),
    "k[1]": lambda n: file([entry("k", ARRAY, array(STRING, 2, string("a") + string("b", n)))]),
    "tensors[0].name": lambda n: file(infos=[string("token_embd.weight", n)]),
    "token_embd.weight: shape": lambda n: file(infos=[described("token_embd.weight", [8, n, n, n], 0)]),
    "token_embd.weight: offset": lambda n: file(infos=[described("token_embd.weight", [8, 8], n & ~31)]),
}


@pytest.mark.parametrize("where", LIES)
@pytest.mark.parametrize("number", HUGE)
def test_lying_numbers(tmp_path: Path, where: str, number: int) -> None:
    error = refused(tmp_path / "m.gguf", LIES[where](number))
    assert error.field == where.replace(": numbers", "").replace(": strings", "")
    assert error.expected != "UTF-8"  # found by its length, not by what lies there


def with_entries(*more: bytes) -> bytes:
    return file([*ENTRIES, *more])


def alignment(kind: int, value: bytes) -> bytes:
    return with_entries(entry("general.alignment", kind, value))


EMBEDDING, NORM = tensors()[:2]
CASES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "file"),
    "other magic": (file(magic=b"GGML"), "magic"),
    "zip": (b"PK\x03\x04" + bytes(100), "magic"),
    "version 0": (file(version=0), "version"),
    "version 1": (file(version=1), "version"),
    "version 4": (file(version=4), "version"),
    "nested arrays": (with_entries(entry("k", ARRAY, array(ARRAY, 1, array(ARRAY, 1, array(U8, 0))))), "k"),
    "array of unknown": (with_entries(entry("k", ARRAY, array(13, 1, b"abcd"))), "k"),
    "type 13": (with_entries(entry("k", 13, b"abcd")), "k: type"),
    "type 2^32-1": (with_entries(entry("k", 2**32 - 1, b"abcd")), "k: type"),
    "boolean 2": (with_entries(entry("k", BOOL, b"\2")), "k"),
    "booleans 2": (with_entries(entry("k", ARRAY, array(BOOL, 2, b"\1\2"))), "k"),
    "key twice": (with_entries(ENTRIES[1]), f"metadata[{len(ENTRIES)}].key"),
    "no key": (with_entries(u32("", 1)), f"metadata[{len(ENTRIES)}].key"),
    "long key": (with_entries(u32("k" * 70_000, 1)), f"metadata[{len(ENTRIES)}].key"),
    "key not UTF-8": (with_entries(entry(b"\xff\xfe", U32, b"abcd")), f"metadata[{len(ENTRIES)}].key"),
    "value not UTF-8": (with_entries(entry("k", STRING, string(b"a\xc3"))), "k"),
    "token not UTF-8": (with_entries(entry("k", ARRAY, array(STRING, 1, string(b"\xed\xa0\x80")))), "k[0]"),
    "architecture a number": (file([u32("general.architecture", 1), *ENTRIES[1:]]), "general.architecture"),
    "architecture an array": (
        file([entry("general.architecture", ARRAY, array(STRING, 1, string("llama"))), *ENTRIES[1:]]),
        "general.architecture",
    ),
    "alignment 0": (alignment(U32, bytes(4)), "general.alignment"),
    "alignment 48": (alignment(U32, struct.pack("<I", 48)), "general.alignment"),
    "alignment 2^31": (alignment(U32, struct.pack("<I", 2**31)), "general.alignment"),
    "alignment true": (alignment(BOOL, b"\1"), "general.alignment"),
    "alignment 32.0": (alignment(F32, struct.pack("<f", 32.0)), "general.alignment"),
    "alignment an array": (alignment(ARRAY, array(U32, 1, struct.pack("<I", 32))), "general.alignment"),
    "tensor twice": (file(infos=[EMBEDDING, described("token_embd.weight", [8], 512)]), "token_embd.weight"),
    "no name": (file(infos=[described("", [8], 0)]), "tensors[0].name"),
    "long name": (file(infos=[described("a" * 300, [8], 0)]), "tensors[0].name"),
    "name not UTF-8": (file(infos=[described(b"\x80", [8], 0)]), "tensors[0].name"),
    "name of control characters": (file(infos=[described("\x1b[2J\n", [8], 0)]), "\x1b[2J\n"),
    "rank 0": (file(infos=[described("output.weight", [], 0)]), "output.weight: dimensions"),
    "rank 5": (file(infos=[described("output.weight", [1] * 5, 0)]), "output.weight: dimensions"),
    "rank 2^32-1": (file(infos=[described("output.weight", [8], 0, rank=2**32 - 1)]), "output.weight: dimensions"),
    "dimension 0": (file(infos=[described("output.weight", [8, 0], 0)]), "output.weight: shape"),
    "product 2^64": (file(infos=[described("output.weight", [2**16] * 4, 0)]), "output.weight: shape"),
    "half a block": (file(infos=[described("output.weight", [48, 2], 0, kind=2)]), "output.weight: shape"),
    "type 4": (file(infos=[described("output.weight", [32], 0, kind=4)]), "output.weight: type"),
    "type Q4_K": (file(infos=[described("output.weight", [256], 0, kind=12)]), "output.weight: type"),
    "misaligned": (file(infos=[described("output.weight", [8], 4)]), "output.weight: offset"),
    "beyond the end": (file(infos=[described("output.weight", [8], 4096)]), "output.weight: offset"),
    "overlap": (file(infos=[EMBEDDING, described("output_norm.weight", [8], 32)]), "output_norm.weight: offset"),
    "the same place": (file(infos=[EMBEDDING, described("output.weight", [8, 6], 0)]), "output.weight: offset"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(tmp_path: Path, case: str) -> None:
    content, field = CASES[case]
    assert refused(tmp_path / "m.gguf", content).field == field


def test_type_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path / "m.gguf", CASES["type Q4_K"][0]).got == "Q4_K"
    assert refused(tmp_path / "m.gguf", CASES["type 4"][0]).got == "type 4"


def test_endless_strings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All arrays share one limit, and the header has its own."""
    monkeypatch.setattr(gguf_header, "MAX_STRINGS", VOCAB + 10)
    few = entry("k", ARRAY, array(STRING, 10, bytes(80)))
    assert open_and_read(tmp_path / "m.gguf", with_entries(few)) == len(SHAPES)
    error = refused(tmp_path / "m.gguf", with_entries(few, entry("l", ARRAY, array(STRING, 1, bytes(8)))))
    assert error.field == "l"
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", len(file()) - 4096)
    assert open_and_read(tmp_path / "m.gguf", file()) == len(SHAPES)
    refused(tmp_path / "m.gguf", with_entries(entry("k", STRING, string("a" * 100))))


def test_sparse_file_of_terabytes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    whole = file([entry("k", ARRAY, array(U64, 2**37))])
    path.write_bytes(whole)
    os.truncate(path, 1 << 40)
    with pytest.raises(FormatError, match="k: expected at most"):
        GgufCheckpoint(path)


def test_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    for name in ("fifo.gguf", "loop.gguf", ""):
        with pytest.raises(FormatError, match="a regular file"):
            GgufCheckpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        GgufCheckpoint(tmp_path / "none.gguf")
    with pytest.raises(ArgumentError):
        GgufCheckpoint("a\0b.gguf")


def test_open_files_are_closed(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for content in (file(), file(version=1), *(content for content, _ in CASES.values())):
        attempt(tmp_path / "m.gguf", content)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_metadata_types(tmp_path: Path) -> None:
    """Every scalar type comes as the Python number it is."""
    packed: dict[int, tuple[str, Any]] = {
        0: ("<B", 200), 1: ("<b", -3), 2: ("<H", 40_000), 3: ("<h", -300), 4: ("<I", 2**32 - 1), 5: ("<i", -(2**31)),
        6: ("<f", 0.5), 10: ("<Q", 2**64 - 1), 11: ("<q", -(2**63)), 12: ("<d", 0.1),
    }  # fmt: skip
    scalars = [entry(f"tokenizer.ggml.{kind}", kind, struct.pack(how, value)) for kind, (how, value) in packed.items()]
    (tmp_path / "m.gguf").write_bytes(with_entries(*scalars))
    with GgufCheckpoint(tmp_path / "m.gguf") as checkpoint:
        for kind, (_, value) in packed.items():
            assert checkpoint.tokenizer[str(kind)] == value
            assert type(checkpoint.tokenizer[str(kind)]) is type(value)
