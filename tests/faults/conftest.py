"""The command line in this process, for what ends before anything is served: no second interpreter starts."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator

import pytest

from coordinator.cli import main
from coordinator.storage import failpoints

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """run(*arguments, fail="") -> what it said and its exit code, with fail-points as `fail` arms them."""

    def command_line(*arguments: object, fail: str = "") -> subprocess.CompletedProcess[str]:
        monkeypatch.setenv(failpoints.VARIABLE, fail)
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        finally:
            failpoints.arm("")
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, said.out, said.err)

    yield command_line
    failpoints.arm("")
