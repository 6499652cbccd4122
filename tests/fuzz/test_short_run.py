"""Every target for a moment; what fails, crashes or hangs is told with its seed."""

from __future__ import annotations

import os
import sys
import time
import types

import pytest
from tests.fuzz import running
from tests.fuzz.running import cases, targets


@pytest.mark.parametrize("name", targets())
def test_some_cases_of_every_target(name):
    n, failures = cases(name, first=1, seconds=1.5)
    assert n >= 1
    assert not failures, "\n".join(failures)


@pytest.fixture
def broken(monkeypatch):
    """A target that goes wrong from the fourth of its cases on, in a way to be chosen."""
    target = types.ModuleType("tests.fuzz.broken")
    target.LIMIT = 1.0

    def check(random, folder):
        drawn.append(1)
        if len(drawn) > 3:
            target.harm()

    drawn: list[int] = []
    target.check = check
    monkeypatch.setitem(sys.modules, "tests.fuzz.broken", target)
    return target


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda: pytest.fail("the numbers differ"), "the numbers differ"),
        (lambda: os.kill(os.getpid(), 9), "the process ended with -9"),
        (lambda: os._exit(3), "the process ended with 3"),
        (lambda: time.sleep(60), "no end within 1 seconds"),
    ],
)
def test_what_goes_wrong_is_told_with_its_seed(broken, harm, said):
    broken.harm = harm
    n, failures = running.cases("broken", first=10, seconds=60, most=4)
    assert n == 4
    (failure,) = failures
    assert failure.startswith("FAILED: python -m tests.fuzz --only broken --seed 13\n")
    assert said in failure
