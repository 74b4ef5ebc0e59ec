"""Runs cases in worker processes, so that a crash, a hang or a hunger for memory costs one case only."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.zoo.law import Record

READY = "ready"
MEMORY = 8 << 30  # bytes of address space of a worker


def work(pipe: Connection, law: str = "structure") -> None:
    """The life of a worker: cases come in, records go out; `law` is one of `cases.LAWS`."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    import torch

    logging.disable(logging.ERROR)  # torch.export prints graphs where it falls back
    torch.set_num_threads(1)
    from tests.zoo.cases import run_case

    pipe.send(READY)
    while (case := pipe.recv()) is not None:
        pipe.send(run_case(case, law))


class Worker:
    """A process that runs one case after another, and is replaced when it does not answer in time."""

    def __init__(self, work: Callable[[Connection], None]) -> None:
        self._work = work
        self._context = multiprocessing.get_context("spawn")
        self.case: Any = None
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = self._context.Pipe()
        self.process = self._context.Process(target=self._work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()  # READY: what it imports takes time that no case is charged for

    def give(self, case: Any) -> None:
        self.case, self.since = case, time.monotonic()
        self.pipe.send(case)

    def take(self) -> Record:
        """The record of the case; a crash is a record, too."""
        case, self.case = self.case, None
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            self._start()
            return lost(case, f"the worker died with exit code {code}", time.monotonic() - self.since)

    def abandon(self) -> Record:
        case, self.case = self.case, None
        self.process.kill()
        self.process.join()
        self._start()
        return lost(case, "no answer in time", time.monotonic() - self.since)

    def stop(self) -> None:
        self.process.kill()


def lost(case: Any, reason: str, seconds: float) -> Record:
    return Record(case.model_class, case.model_type, case.task, stage="lost", reason=reason, seconds=seconds)


def sweep(
    cases: Sequence[Any], workers: int, timeout: float, work: Callable[[Connection], None] = work
) -> Iterator[Record]:
    """Records of all cases, in the order in which they are done; `work` is the life of a worker."""
    waiting, staff = list(reversed(cases)), [Worker(work) for _ in range(min(workers, len(cases)))]
    try:
        while waiting or any(worker.case is not None for worker in staff):
            for worker in staff:
                if worker.case is None and waiting:
                    worker.give(waiting.pop())
            busy = [worker for worker in staff if worker.case is not None]
            ready = set(wait([worker.pipe for worker in busy], timeout=1.0))
            for worker in busy:
                if worker.pipe in ready:
                    yield worker.take()
                elif time.monotonic() - worker.since > timeout:
                    yield worker.abandon()
    finally:
        for worker in staff:
            worker.stop()
