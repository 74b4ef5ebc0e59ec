"""A function in a process of its own, for what none takes back: its user, its peak of memory."""

import os
import traceback


def run_in_a_child(function):
    """Fork, call `function` there, and wait; AssertionError with its traceback where it raised."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException:
            os.write(writing, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        problem = told.read()
    os.waitpid(child, 0)
    assert not problem, problem
