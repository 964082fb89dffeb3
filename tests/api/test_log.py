"""What the service writes about itself."""

import json
import subprocess
import sys

PROGRAM = """
import logging
from service.http import log

def fail():
    token = "dar-sk-do-not-" + "show-me"
    raise RuntimeError("something broke")

log.configure("info")
try:
    fail()
except RuntimeError:
    logging.getLogger("uvicorn.error").exception("unhandled")
    log.log.exception("unhandled")
"""


def test_a_traceback_shows_no_local_variables() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert [line["exception"][0]["exc_value"] for line in lines] == ["something broke"] * 2
    assert "dar-sk-do-not-show-me" not in result.stderr
