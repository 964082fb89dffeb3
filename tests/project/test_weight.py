"""What must not be loaded: a client without torch, a service without torch, a command line that
answers at once.
"""

import json
import subprocess
import sys

HEAVY = {"torch", "transformers", "numpy", "accelerate", "datasets", "peft"}


def modules_after(statement: str) -> set[str]:
    program = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_importing_dar_loads_nothing_beyond_the_standard_library() -> None:
    third_party = {"pydantic", "httpx2", "typer", "rich", "ulid"} | HEAVY
    assert not modules_after("import dar") & third_party


def test_the_names_of_dar_are_listed_before_they_are_loaded() -> None:
    assert not modules_after("import dar; assert 'DARTrainer' in dir(dar)") & HEAVY


OUTSIDE = ("dar.client", "dar.rewards.server", "dar.cli.up", "worker.app", "service.app")
TORCH = ("torch", "transformers", "accelerate", "datasets", "peft")


def test_torch_is_never_loaded_outside_the_trainer() -> None:
    statement = (
        "import importlib\n"
        f"for name in {OUTSIDE}:\n"
        "    importlib.import_module(name)\n"
        f"    assert not set({TORCH}) & set(sys.modules), name"
    )
    assert not modules_after(statement) & set(TORCH)


def test_the_command_line_loads_no_server_to_show_its_help() -> None:
    statement = (
        "from typer.testing import CliRunner\nfrom dar.cli.main import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0"
    )
    assert not modules_after(statement) & (
        HEAVY | {"fastapi", "sqlalchemy", "celery", "httpx2", "pydantic"}
    )
