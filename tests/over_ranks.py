"""Runs a function in several processes that are the ranks of one Gloo group."""

from __future__ import annotations

import os
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)


def _rank(rank, function, world, store, arguments):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=world, store=dist.FileStore(store, world), timeout=TIMEOUT
    )
    function(rank, *arguments)
    dist.destroy_process_group()
    # torch's FSDP2 on Gloo sometimes aborts as a process ends ("terminate called without an active
    # exception"), also where fusedopt was never imported.
    os._exit(0)


def run(function, world, *arguments):
    """Calls function(rank, *arguments) on every rank; an error of one is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        mp.spawn(_rank, (function, world, store, arguments), nprocs=world)
