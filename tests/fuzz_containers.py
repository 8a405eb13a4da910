# SPDX-License-Identifier: Apache-2.0
"""Random damage to every kind of file: `make fuzz`, or `python tests/fuzz_containers.py --cases 1000 --seed 7`.

A child process with little memory and a time limit per file reads each damaged file. Whatever it reads must be sound;
for anything else it must raise ``FormatError``. On a failure the file is kept, and the printed line repeats the case.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path
from types import FrameType

import hostile
import hostile_numpy
import hostile_tensors
from flashllm.errors import ArgumentError, FormatError

MEMORY_BYTES = 512 << 20
"""Memory that reading a file may take, beyond what the process has after its imports."""
SECONDS = 10
_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_DIGITS = (b"0", b"-1", b"1", b"4294967296", b"9223372036854775807", b"1e9", b"NaN", b"null", b"[]", b"9" * 400)


def damage(raw: bytes, rng: random.Random) -> bytes:
    """Some bytes of ``raw`` changed, lost, moved or repeated."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not out:
            break
        at = rng.randrange(len(out))
        way = rng.randrange(9)
        if way <= 1:
            out[at] ^= 1 << rng.randrange(8)
        elif way == 2:
            out[at] = rng.randrange(256)
        elif way == 3:
            size = rng.choice((2, 4, 8))
            out[at : at + size] = (rng.choice(_NUMBERS) % 256**size).to_bytes(size, rng.choice(("little", "big")))
        elif way == 4:
            del out[at:]
        elif way == 5:
            del out[at : at + rng.choice((1, 4, 16, 100))]
        elif way == 6:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 16)))
        elif way == 7:
            start = rng.randrange(len(out))
            piece = out[start : start + rng.choice((4, 16, 64))]
            out[at : at + len(piece)] = piece
        else:
            places = [i for i, byte in enumerate(out[:4096]) if 0x30 <= byte <= 0x39]
            if places:
                at = rng.choice(places)
                out[at : at + 1] = rng.choice(_DIGITS)
    return bytes(out)


def damaged_archive(rng: random.Random) -> dict[str, bytes]:
    """Entries of an archive with damage in one of them, which a matching checksum will cover."""
    entries = hostile_numpy.arrays(rng.choice(("csr", "csc", "coo")))
    name = rng.choice(list(entries))
    entries[name] = damage(entries[name], rng)
    return entries


def write_case(kind: str, path: Path, sound: bytes, rng: random.Random) -> None:
    """One damaged file of ``kind``."""
    inside = rng.random() < 0.6
    if kind == "npz" and inside:
        hostile_numpy.write_zip(path, damaged_archive(rng), zipfile.ZIP_STORED)
    elif kind in ("safetensors", "weights") and inside:
        # The stated length of the header is made to fit: otherwise damage would get no further than that length.
        text, rest = hostile_tensors.split(sound)
        path.write_bytes(hostile_tensors.with_header(damage(text, rng), rest))
    else:
        path.write_bytes(damage(sound, rng))


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def child(cases: int, seed: int, folder: Path, first: int) -> None:
    """Read every named mutation (if ``first`` is 0), then ``cases`` damaged files."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, _too_slow)
    containers = hostile.containers()
    sound = {}
    for kind, container in containers.items():
        path = folder / f"sound{container.suffix}"
        container.write(path)
        container.use(container.read(path))  # imports everything it needs
        sound[kind] = path.read_bytes()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    for kind, container in containers.items() if first == 0 else ():
        path = folder / f"{kind}{container.suffix}"
        for name, mutation in container.mutations.items():
            (folder / "case").write_text(f"mutation {kind}-{name}")
            mutation.write(path)
            signal.alarm(SECONDS)
            hostile.check(container, mutation, path)
            signal.alarm(0)
    outcomes: Counter[str] = Counter()
    for number in range(first, first + cases):
        rng = random.Random(f"{seed}:{number}")
        kind = rng.choice(list(containers))
        container = containers[kind]
        path = folder / f"{kind}{container.suffix}"
        write_case(kind, path, sound[kind], rng)
        (folder / "case").write_text(f"--seed {seed} --first {number} --cases 1, file {path.name}")
        signal.alarm(SECONDS)
        try:
            container.use(container.read(path))
            outcomes[f"{kind} read"] += 1
        except FormatError as error:
            hostile.check_parts(error, path)
            outcomes[f"{kind} refused"] += 1
        except ArgumentError as error:
            if error.argument != "tensor":
                raise
            outcomes[f"{kind} tensor under another name"] += 1
        signal.alarm(0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(", ".join(f"{name} {count:,}" for name, count in sorted(outcomes.items())) + f"; at most {peak} MiB")


def main() -> int:
    """Run a child process and report how it went; the exit status is 0 for success."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=None, help="default: a random one, printed")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--child", type=Path, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        child(given.cases, given.seed, given.child, given.first)
        return 0
    seed = secrets.randbelow(2**31) if given.seed is None else given.seed
    print(f"seed {seed}, {given.cases:,} cases", flush=True)
    # On a disk, replacing small files 100,000 times takes longer than reading them.
    memory = Path("/dev/shm")
    fast = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 256 << 20
    folder = Path(tempfile.mkdtemp(prefix="flashllm-fuzz-", dir=memory if fast else None))
    start = time.monotonic()
    options = ["--cases", str(given.cases), "--seed", str(seed), "--first", str(given.first), "--child", str(folder)]
    status = subprocess.run([sys.executable, __file__, *options], check=False).returncode
    if status != 0:
        case = folder / "case"
        what = case.read_text() if case.exists() else "before the first case"
        print(f"failed with status {status}: {what}; the files are kept in {folder}")
        return 1
    shutil.rmtree(folder)
    print(f"every file was refused or sound, in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
