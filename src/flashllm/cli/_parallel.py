# SPDX-License-Identifier: Apache-2.0
"""The option of commands that divide a model among GPUs, and the group that it creates."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flashllm.statuses import PEER_FAILED

if TYPE_CHECKING:
    from flashllm.engine.parallel import Group

tensor_parallel_option = click.option(
    "--tp",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Divide the model among N GPUs, one process per GPU. Under torchrun or mpirun: the number of their processes.",
)
RANK_STATUS = (
    f"With --tp also the status of a rank that failed: {PEER_FAILED} if another rank failed or the ranks differ,"
    " 128 plus the number of a signal that ended it."
)
"""What the help of these commands adds to their exit statuses."""


@contextlib.contextmanager
def tensor_parallel(count: int) -> Iterator[Group]:
    """The group for ``--tp count``, in each of its processes; only rank 0 prints.

    If there are several ranks and nothing has started their processes, this runs this process's command line again in
    a process for each rank and exits with their status. Raises ``ArgumentError`` for more ranks than GPUs.
    """
    from flashllm.engine.communicator import CommunicationError
    from flashllm.engine.nccl import without_multicast
    from flashllm.engine.parallel import check_gpus, open_group, place_of
    from flashllm.engine.processes import launch_ranks

    place = place_of(os.environ)
    if place is None and count > 1:
        check_gpus(count)
        without_multicast(os.environ)
        raise SystemExit(launch_ranks(count, [sys.executable, "-m", "flashllm", *sys.argv[1:]]))
    if place is not None and count == 1:
        count = place.count
    try:
        with open_group(count) as group, contextlib.ExitStack() as silenced:
            if group.rank:
                nowhere = silenced.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
                silenced.enter_context(contextlib.redirect_stdout(nowhere))
                silenced.enter_context(contextlib.redirect_stderr(nowhere))
            yield group
    except CommunicationError as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(PEER_FAILED) from error
