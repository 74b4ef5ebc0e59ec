"""The processes of a table: each makes one run at a time, so that a killed one costs its run and no other.

Each sees one accelerator: with several, Trainer would split a batch over them that is as many times as large.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers

from tables.plan import Run


class Worker:
    """One process, which starts with its first run; another one takes its place where it was killed.

    Args:
        device: the accelerator that it sees, as CUDA_VISIBLE_DEVICES names it; None where there is none.
    """

    def __init__(self, device: str | None = None) -> None:
        self._device, self._process = device, _process()

    def submit(self, job: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future:
        with _visible(self._device):  # the process starts here, and what it imports may look for devices
            try:
                return self._process.submit(job, *arguments)
            except concurrent.futures.BrokenExecutor:
                self._process = _process()
                return self._process.submit(job, *arguments)

    def end(self) -> None:
        """Waits for the run that it makes."""
        self._process.shutdown(cancel_futures=True)


def outcomes(
    runs: Sequence[Run], job: Callable[[Run], dict[str, Any]], workers: int
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(name, result of `job` or why there is none), as runs finish; a run waits for those that it needs.

    No run waits in a process: whoever interrupts a table waits for `workers` runs at most.
    """
    waiting = {run.name: run for run in runs}
    names: Sequence[str | None] = devices() or [None]
    free = [Worker(names[number % len(names)]) for number in range(min(workers, len(runs)))]
    running: dict[concurrent.futures.Future, tuple[str, Worker]] = {}
    failed: set[str] = set()
    try:
        while waiting or running:
            for name, run in list(waiting.items()):
                unfinished = {*waiting, *(other for other, _ in running.values())}
                if failed & set(run.needs):
                    failed.add(name)
                    del waiting[name]
                    yield name, "a run that it needs did not finish."
                elif free and not unfinished & set(run.needs):
                    worker = free.pop()
                    running[worker.submit(job, run)] = name, worker
                    del waiting[name]
            ready, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in ready:
                name, worker = running.pop(future)
                free.append(worker)
                outcome = _outcome(future)
                if isinstance(outcome, str):
                    failed.add(name)
                yield name, outcome
    finally:
        for worker in (*free, *(worker for _, worker in running.values())):
            worker.end()


def devices() -> list[str]:
    """The accelerators that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [*(named.split(",") if named else map(str, range(count)))][:count]


@contextlib.contextmanager
def _visible(device: str | None) -> Iterator[None]:
    """A process that is started inside sees this accelerator only; None leaves all as it is."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    if device is not None:
        os.environ[name] = device
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        else:
            os.environ.pop(name, None)


def _outcome(future: concurrent.futures.Future) -> dict[str, Any] | str:
    error = future.exception()
    if error is None:
        return future.result()
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _process() -> concurrent.futures.Executor:
    os.environ["TQDM_DISABLE"] = "1"  # for the workers, whose bars would run over each other
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, context, initializer=_start)


def _start() -> None:
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")


def _end_with_parent(parent: int) -> None:
    """A killed table must not leave its runs behind, which would slow everything that follows."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
