"""The wheel that `make dist` builds holds everything that an installation needs."""

import subprocess
import sys
from pathlib import Path

import pytest

from dar.settings import inherited_environment
from dar.version import __version__

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel; its dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("dist")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), "."]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"dar_service-{__version__}-py3-none-any.whl"
    target = folder / "installed"
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return target


@pytest.mark.slow  # builds a wheel
@pytest.mark.parametrize(
    ("module", "arguments", "printed"),
    [
        ("dar.cli", ["--version"], f"dar {__version__}"),
        ("dar.cli", ["migrate", "--home", "home"], ""),
        ("dar.training", ["--help"], "--reward_url"),
    ],
)
def test_the_wheel_runs_without_the_clone(
    installed: Path, tmp_path: Path, module: str, arguments: list[str], printed: str
) -> None:
    environment = inherited_environment(("PATH", "LANG")) | {"PYTHONPATH": str(installed)}

    def python(*words: str) -> str:
        return subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    found = python("-c", f"import {module} as found; print(found.__file__)")
    assert Path(found.strip()).is_relative_to(installed)
    assert printed in python("-m", module, *arguments)


@pytest.mark.slow  # builds a wheel
def test_the_wheel_carries_its_licence(installed: Path) -> None:
    (information,) = installed.glob("dar_service-*.dist-info")
    assert "License-Expression: Apache-2.0" in (information / "METADATA").read_text()
    assert (information / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
