"""The ``dar`` command in this process, without the second that a process of its own imports."""

import contextlib
import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from dar.cli.main import main


@dataclass(frozen=True)
class Ended:
    """What a command printed, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


def run_command(
    *arguments: str, environment: Mapping[str, str], folder: Path | None = None
) -> Ended:
    """Run ``dar`` with ``arguments``, in ``folder`` if one is given, and wait for its end.

    Modules that the command imports from the folder are forgotten afterwards.
    """
    out, err = io.StringIO(), io.StringIO()
    modules, path = set(sys.modules), list(sys.path)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["dar", *arguments])
        if folder is not None:
            patch.chdir(folder)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
                code = 0
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        origin = getattr(sys.modules[name], "__file__", None)
        if folder is not None and origin and Path(origin).is_relative_to(folder):
            del sys.modules[name]
    return Ended(code, out.getvalue(), err.getvalue())
