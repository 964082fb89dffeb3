"""The tests with the ``openai`` client pass with other versions of it too."""

import subprocess
import sys
from pathlib import Path

import pytest

from dar.settings import own_environment

HERE = Path(__file__).parent
VERSIONS = ("3.3.1", "3.57.0")
TESTS = (
    "test_openai_sdk.py",
    "files/test_file_uploads.py",
    "streams/test_stream.py",
    "jobs/test_documented_jobs.py",
)


@pytest.mark.slow  # other tests once more for each version
@pytest.mark.parametrize("version", VERSIONS)
def test_another_version_of_the_client_drives_the_service(version: str, tmp_path: Path) -> None:
    folder = tmp_path / "client"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    subprocess.run([*pip, f"openai=={version}"], check=True)
    found = own_environment({"PYTHONPATH": str(folder)})
    asked = [sys.executable, "-c", "import openai; print(openai.__version__)"]
    used = subprocess.run(asked, env=found, check=True, capture_output=True, text=True)
    assert used.stdout.strip() == version
    suite = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    done = subprocess.run(
        [*suite, *(HERE / name for name in TESTS)],
        cwd=HERE.parents[1],
        env=found,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
