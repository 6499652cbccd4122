"""Drawn cases against independent expectations, for as long as one likes.

    python -m tests.fuzz --minutes 60                 # every target in turn
    python -m tests.fuzz --minutes 5 --only images    # one of them (or some, with commas)
    python -m tests.fuzz --only images --seed 1234    # one case, in this process: where it fails, a debugger can look

A case is a function of its target and seed. Cases run in processes of their own, so that a crash or a hang is a failure
like others, and its seed is told. The suite runs every target for a moment (`test_short_run.py`).

To add a target: one file in this folder, named as the target, with

    def check(random: numpy.random.Generator, folder: pathlib.Path) -> None

which draws one case from ``random``, may write into the empty ``folder``, and raises (an AssertionError with the case
in its message) if what the project does is not what another, independent way to the same result gives. It must leave
nothing behind in the process: environment, working folder, signal handlers are as they were. ``LIMIT``, if the file has
it, is how many seconds a case may take, instead of 60; more where the machine has more processes to run than cores.
"""
