"""Processes that run functions together, started once: importing PyTorch costs them seconds."""

from __future__ import annotations

import datetime as dt
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 300.0  # seconds for one function; a rank that raises ends the others at once


class Pool:
    """A few processes that talk by gloo; they are started at the first call, and again after a failure."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.processes: list[Any] = []
        self.connections: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a module's function returns on rank 0, after all ranks have run it; fails with any rank's traceback."""
        if not self.processes:
            self._start()
        for connection in self.connections:
            connection.send((function, args))
        returned: dict[int, Any] = {}
        while len(returned) < self.ranks:
            ready = wait([c for i, c in enumerate(self.connections) if i not in returned], PATIENCE)
            if not ready:
                self.stop()
                raise AssertionError(f"ranks {sorted(set(range(self.ranks)) - set(returned))} do not answer")
            for connection in ready:
                rank = self.connections.index(connection)
                failure, returned[rank] = connection.recv()
                if failure:
                    self.stop()
                    raise AssertionError(f"rank {rank}: {failure}")
        return returned[0]

    def stop(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.processes, self.connections = [], []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        meeting = str(Path(tempfile.mkdtemp()) / "store")
        for rank in range(self.ranks):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.ranks, meeting, there), daemon=True)
            process.start()
            self.processes.append(process)
            self.connections.append(here)


def _serve(rank: int, ranks: int, meeting: str, calls: Connection) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, ranks)
    patience = dt.timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=patience)
    while True:
        function, args = calls.recv()
        try:
            calls.send((None, function(*args)))
        except Exception:  # noqa: BLE001 - whatever it is, the test reports it
            calls.send((traceback.format_exc(), None))
