"""Laws of a table's processes: few runs at a time, and a process that is killed costs its own run only."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from tables import workers
from tables.plan import Run

JOB = """
import os, signal
def job(run):
    if run.settings.get("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    return {"name": run.name}
"""


def run(name, *needs, **settings):
    return Run(name, settings, needs, False)


@pytest.fixture
def threads(monkeypatch):
    """A thread in place of each process."""
    monkeypatch.setattr(workers, "_process", lambda: ThreadPoolExecutor(1))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 2])
def test_a_table_that_is_interrupted_starts_no_further_run(count):
    begun = []
    found = workers.outcomes([run(str(i)) for i in range(9)], lambda run: begun.append(run.name) or {}, count)
    next(found)
    found.close()  # as Ctrl-C does
    assert len(begun) <= count


@pytest.mark.usefixtures("threads")
def test_every_run_comes_after_those_that_it_needs():
    runs = [run("b", "a"), run("c", "b"), run("a"), run("x")]
    names = [name for name, _ in workers.outcomes(runs, lambda run: {}, 2)]
    assert sorted(names) == ["a", "b", "c", "x"]
    assert names.index("a") < names.index("b") < names.index("c")


@pytest.mark.usefixtures("threads")
def test_a_run_after_a_failed_one_is_not_begun():
    def job(run):
        raise KeyError(run.name)

    found = dict(workers.outcomes([run("a"), run("b", "a"), run("c", "b")], job, 1))
    assert found == {"a": "KeyError: 'a'"} | dict.fromkeys("bc", "a run that it needs did not finish.")


def test_a_killed_process_costs_its_own_run_only(tmp_path, monkeypatch):
    (tmp_path / "table_job.py").write_text(JOB)
    monkeypatch.syspath_prepend(tmp_path)
    from table_job import job

    runs = [run("a", killed=True), *(run(name) for name in "bcd"), run("e", "a")]
    found = dict(workers.outcomes(runs, job, 2))
    assert {name for name, outcome in found.items() if isinstance(outcome, str)} == {"a", "e"}
    assert found["a"].startswith("BrokenProcessPool: ")
    alone = dict(workers.outcomes(runs, job, 1))  # another process takes the killed one's place
    assert {name for name, outcome in alone.items() if isinstance(outcome, str)} == {"a", "e"}


# -- accelerators -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("threads")
def test_each_worker_has_one_of_the_visible_devices(monkeypatch):
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert workers.devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3,-1,4")  # CUDA stops at the first that there is not
    assert workers.devices() == ["5", "3"]
    given, worker = [], workers.Worker
    monkeypatch.setattr(workers, "Worker", lambda device: given.append(device) or worker(device))
    assert len(dict(workers.outcomes([run(name) for name in "abc"], lambda run: {}, 3))) == 3
    assert given == ["5", "3", "5"]


def test_a_process_sees_its_device_from_its_start(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    worker = workers.Worker("3")
    assert worker.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result() == "3"
    worker.end()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,3"
