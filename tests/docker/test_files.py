"""The files of ``docker/``: what a linter or a look at them can show."""

import configparser
import json
import re
import shutil
import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from dar.settings import Settings, inherited_environment, is_secret, load_settings
from fakes.compose import DOCKER, Container, containers, image_of
from fakes.containers import programs
from service.__main__ import GRACE_SECONDS

BIN = Path(sys.executable).parent
COMPOSE = ("compose.yaml", "gpu-host.yaml")
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
UNITS = sorted((DOCKER / "systemd").iterdir())
SETTINGS = {f"DAR_{name.upper()}": field for name, field in Settings.model_fields.items()}
OF_COMPOSE_ALONE = {"DAR_VERSION", "DAR_DOMAIN", "DAR_MODELS"}
"""Variables of the compose files that are no settings."""
UNKNOWN_TO_SYSTEMDLINT = {
    "LoadCredential is not supported": "systemd has it since version 247, and %d since 250",
    "RestartPreventExitStatus=78": "it takes names of signals alone; systemd takes codes too",
    "Files created by service are world-writeable": "it reads 0077 as the rights that are given",
    "Service should have Delegate being set": "neither process manages control groups",
}
"""Findings of systemdlint that are none, each with the reason."""


def run(*command: object, folder: Path = DOCKER) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def made() -> dict[str, Container]:
    """All containers; those of a GPU host with the name of their file before their own."""
    others = containers(DOCKER / "gpu-host.yaml").items()
    return containers(DOCKER / "compose.yaml") | {f"gpu-host/{name}": one for name, one in others}


@pytest.mark.parametrize(
    "command",
    [
        (BIN / "hadolint", *DOCKERFILES),
        (BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", *COMPOSE),
        ("sh", "-n", "secrets.sh", "pin.sh"),
    ],
    ids=lambda command: Path(command[0]).name,
)
def test_the_linters_find_nothing(command: tuple[object, ...]) -> None:
    ended = run(*command)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_systemdlint_finds_nothing_but_what_it_does_not_know() -> None:
    ended = run(BIN / "systemdlint", "--norootfs", *UNITS)
    said = [line for line in (ended.stdout + ended.stderr).splitlines() if "[" in line]
    assert [line for line in said if not any(one in line for one in UNKNOWN_TO_SYSTEMDLINT)] == []


@pytest.mark.skipif(find_spec("caddysnake") is None, reason="no wheel of Caddy for this machine")
def test_the_proxy_accepts_its_configuration(tmp_path: Path) -> None:
    caddy = programs(tmp_path / "bin") / "caddy"
    ended = run(caddy, "adapt", "--config", "Caddyfile", "--adapter", "caddyfile", "--validate")
    assert ended.returncode == 0, ended.stderr
    assert "not formatted" not in ended.stderr


def test_every_container_is_confined_watched_and_stopped_in_time(
    made: dict[str, Container],
) -> None:
    drain = Settings().drain_seconds
    for name, one in made.items():
        assert one.hardening["read_only"] is True, name
        assert one.hardening["cap_drop"] == ["ALL"], name
        assert one.hardening["cap_add"] is None, name
        assert one.hardening["security_opt"] == ["no-new-privileges:true"], name
        assert int(one.user.partition(":")[0]) > 0, f"{name} runs as root"
        assert one.health, f"{name} has no health check"
        if "worker-" in name:
            assert one.stop_seconds >= drain + 30, "a job could not write its checkpoint"
            assert one.variables["DAR_SLOT"] == name[-1], "each worker has a slot of its own"
        if name.startswith("service-"):
            assert one.stop_seconds > 2 * GRACE_SECONDS


def test_every_variable_is_a_setting_and_every_secret_a_file(
    made: dict[str, Container],
) -> None:
    files = {name for name, field in SETTINGS.items() if is_secret(field.annotation)}
    for name, one in made.items():
        ours = {key for key in one.variables if key.startswith("DAR_")} - OF_COMPOSE_ALONE
        secrets = {key for key in ours if key.removesuffix("_FILE") in files}
        assert ours - secrets <= set(SETTINGS), name
        assert all(key.endswith("_FILE") for key in secrets), f"a secret in a variable of {name}"
        named = {value for key, value in one.variables.items() if key.endswith("_FILE")}
        assert named <= {f"/run/secrets/{secret}" for secret in one.secrets}, name
        if name.startswith("service-"):
            assert secrets == {f"{key}_FILE" for key in files - {"DAR_HF_TOKEN"}}, name
        elif "worker-" in name:
            assert secrets <= {
                f"DAR_{key}_FILE" for key in ("WORKER_KEY", "HF_TOKEN", "BROKER_URL")
            }
    example = (DOCKER / ".env.example").read_text()
    given = set(re.findall(r"^(?:# )?([A-Z0-9_]+)=", example, re.MULTILINE))
    used = set(
        re.findall(r"\$\{([A-Z0-9_]+)", "".join((DOCKER / name).read_text() for name in COMPOSE))
    )
    assert given <= used
    assert used - given == {"DAR_DEVICES", "DAR_STORAGE_URL", "DAR_S3_ENDPOINT", "DAR_S3_REGION"}


def test_base_images_have_a_full_version_and_every_stage_of_one_file_the_same() -> None:
    texts = {path.name: path.read_text() for path in (*DOCKERFILES, DOCKER / "compose.yaml")}
    images = {
        image: name
        for name, text in texts.items()
        for image in re.findall(r"^(?:FROM|    image:) ([^\s$]+)(?: AS .*)?$", text, re.MULTILINE)
    }
    assert len(images) == 6
    for image in images:
        assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.?\d*(-[a-z0-9.]+)*(@sha256:[0-9a-f]{64})?", image)
    assert "postgres:17" in "".join(images)
    assert "postgresql-client-17" in texts["service.Dockerfile"]
    assert image_of(DOCKER / "service.Dockerfile").variables["DAR_POSTGRES_BIN"].endswith("/17/bin")


def test_the_script_makes_every_secret_once(
    made: dict[str, Container], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "secrets"
    assert run(DOCKER / "secrets.sh", folder).returncode == 0
    first = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(first) == {secret for one in made.values() for secret in one.secrets}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o444}
    values = [value for name, value in first.items() if name != "hf_token"]
    assert min(map(len, values)) > 40
    assert len(set(values)) == len(values)
    (folder / "api_key").unlink()
    assert run(DOCKER / "secrets.sh", folder).returncode == 0
    again = {path.name: path.read_text() for path in folder.iterdir()}
    assert {name for name in first if again[name] != first[name]} == {"api_key"}

    for key, value in made["service-1"].variables.items():
        if key.startswith("DAR_") and key.endswith("_FILE"):
            monkeypatch.setenv(key, value.replace("/run/secrets", str(folder)))
    settings = load_settings()
    assert settings.sqlalchemy_url.startswith("postgresql+psycopg://dar:")
    assert settings.secret_from(settings.api_key, "api_key") == again["api_key"].strip()
    (identity,) = json.loads(first["s3_identities"])["identities"]
    assert settings.s3_secret_access_key is not None
    (credentials,) = identity["credentials"]
    assert credentials["secretKey"] == settings.s3_secret_access_key.get_secret_value()
    assert all(right.endswith(":dar") for right in identity["actions"])


def test_the_units_have_the_settings_of_the_containers(made: dict[str, Container]) -> None:
    for name, container in (
        ("dar-service.service", made["service-1"]),
        ("dar-worker@.service", made["gpu-host/worker-0"]),
    ):
        unit = configparser.RawConfigParser(strict=False)
        text = (DOCKER / "systemd" / name).read_text()
        unit.read_string(
            re.sub(r"^(Environment|LoadCredential)=.*\n", "", text, flags=re.MULTILINE)
        )
        service = unit["Service"]
        variables = dict(re.findall(r"^Environment=([A-Z0-9_]+)=(.*)$", text, re.MULTILINE))
        credentials = dict(re.findall(r"^LoadCredential=(\w+):(.*)$", text, re.MULTILINE))
        files = {key for key in variables if key.endswith("_FILE")}
        expected = {key for key in container.variables if key.endswith("_FILE")}
        optional = {key for key in expected if "HF_TOKEN" in key or "S3" in key}
        assert files == expected - optional, "a token of the hub and a bucket are not needed"
        assert {variables[key] for key in files} == {f"%d/{secret}" for secret in credentials}
        assert {key for key in variables if key.startswith("DAR_")} - files <= set(SETTINGS)
        assert service["ExecStart"] == f"/opt/dar/bin/{' '.join(container.command)}"
        assert float(service["TimeoutStopSec"]) == container.stop_seconds
        assert service["ProtectSystem"] == "strict"
        assert "DynamicUser" in service or service["User"] != "root"


STAND_IN = """#!/bin/sh
# docker buildx imagetools inspect --format … IMAGE
test "$1 $2 $3" = "buildx imagetools inspect" || exit 9
printf 'sha256:'
printf %s "$6" | sha256sum | cut -d ' ' -f 1
"""


def test_digests_are_written_where_a_registry_answers_and_nothing_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, tools = tmp_path / "docker", tmp_path / "bin"
    shutil.copytree(DOCKER, copy, ignore=shutil.ignore_patterns("secrets", "models", ".env"))
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:{inherited_environment(['PATH'])['PATH']}")
    before = {path: path.read_text() for path in copy.glob("*.*")}

    (tools / "docker").write_text("#!/bin/sh\nexit 1\n")
    (tools / "docker").chmod(0o755)
    ended = run(copy / "pin.sh")
    assert (ended.returncode, "nothing was changed" in ended.stderr) == (1, True)
    assert {path: path.read_text() for path in copy.glob("*.*")} == before

    (tools / "docker").write_text(STAND_IN)
    ended = run(copy / "pin.sh")
    assert ended.returncode == 0, ended.stderr
    after = {path: path.read_text() for path in copy.glob("*.*")}
    assert {path.name for path in after if after[path] != before[path]} == {
        *(path.name for path in DOCKERFILES),
        "compose.yaml",
    }
    for path in after:
        assert re.sub(r"@sha256:[0-9a-f]{64}", "", after[path]) == before[path]
        found = re.findall(r"^(?:FROM|    image:) ([^\s$]+)(?: AS .*)?$", after[path], re.MULTILINE)
        assert all("@sha256:" in image for image in found)
    assert run(copy / "pin.sh").returncode == 0
    assert {path: path.read_text() for path in copy.glob("*.*")} == after


def test_the_page_names_settings_series_and_files_that_exist() -> None:
    page = (DOCKER.parent / "docs" / "production.md").read_text()
    settings = {name.removesuffix("_FILE") for name in re.findall(r"DAR_[A-Z0-9_]+[A-Z]", page)}
    others = {f"DAR_{name.upper()}" for name in Settings.model_fields} | OF_COMPOSE_ALONE
    assert settings <= others
    operations = (DOCKER.parent / "docs" / "operations.md").read_text()
    series = set(re.findall(r"\bdar_[a-z_]+[a-z]\b", page)) - {"dar_inside"}
    assert {name for name in series if f"`{name}`" not in operations} == set()
    named = set(re.findall(r"`?(docker/[a-z./@-]+[a-z])\b", page))
    made_later = {"docker/secrets", "docker/models", "docker/.env"}
    for name in named:
        path = DOCKER.parent / name
        assert path.exists() or any(name.startswith(one) for one in made_later), name
    rules = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    alerts = yaml.safe_load(rules[1])["groups"][0]["rules"]
    assert len(alerts) > 5
    assert all(alert["expr"] for alert in alerts)
