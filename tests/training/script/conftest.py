import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from huggingface_hub.utils import logging as hub_logging

from fakes.training.folder import fill


@pytest.fixture
def folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Path]:
    """The working directory of somebody who wants to train, with everything in it."""
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("DAR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "80")
    sys.modules.pop("judge", None)
    levels = transformers.utils.logging.get_verbosity(), hub_logging.get_verbosity()
    yield tmp_path
    transformers.utils.logging.set_verbosity(levels[0])
    hub_logging.set_verbosity(levels[1])
