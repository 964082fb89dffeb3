"""Settings that cannot work: one sentence at the start, which names the variable and no secret."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import structlog

from dar.client import Client
from dar.errors import ConfigurationError
from dar.settings import Settings, environment, is_secret, load_settings, variable_of
from fakes.command_line import run_command
from service.__main__ import main as run_service
from worker.__main__ import main as run_worker
from worker.identity import claim_of

SECRET = "s3cretP4ss"
Start = Callable[..., tuple[int, str]]


@pytest.fixture
def start(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: object
) -> Iterator[Start]:
    """Start a process with variables; gives its exit code and what it said."""
    configured, root = structlog.get_config(), logging.getLogger()
    handlers, level, umask = root.handlers[:], root.level, os.umask(0o077)

    def run(main: Callable[[], int], **variables: str) -> tuple[int, str]:
        for name, value in {"DAR_HOME": f"{tmp_path}/home", **variables}.items():
            monkeypatch.setenv(name, value)
        code = main()
        return code, "".join(capfd.readouterr())

    yield run
    os.umask(umask)
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**configured)


def migrate() -> int:
    return run_service(["migrate"])


@pytest.mark.parametrize("main", [migrate, run_worker])
@pytest.mark.parametrize(
    ("url", "why"),
    [
        (f"redis://:{SECRET}#x@127.0.0.1:9/0", "port"),
        (f"redis://:{SECRET}/x@127.0.0.1:9/0", "port"),
        (f"redis://:1/{SECRET}@127.0.0.1:9/0", "number of a database"),
        (f"redis://:1#{SECRET}@127.0.0.1:9/0", "#"),
        (f"redis://h:1?{SECRET}=1", "query"),
        (f"rediss://:{SECRET}@h/0?ssl_cert_reqs={SECRET}", "query"),
        (f"redis://:{SECRET}@h:notaport/0", "port"),
        (f"redis://:{SECRET}@h:99999/0", "port"),
        (f"redis://:{SECRET}@h:6379/abc", "number of a database"),
        (f"redis://:{SECRET}@a..b:6379/0", "host"),
        (f"redis://:{SECRET}@[::1/0", "host"),
        (f"redis://:{SECRET} x@h/0", "space"),
        (f"amqp://:{SECRET}@h", "redis://"),
    ],
)
def test_a_broker_url_that_no_client_could_read_is_refused_without_its_password(
    start: Start, main: Callable[[], int], url: str, why: str
) -> None:
    code, said = start(main, DAR_BROKER_URL=url)
    assert code in {1, 78}
    assert said.count("\n") == 1
    assert "DAR_BROKER_URL" in said
    assert why in said
    assert SECRET not in said


@pytest.mark.parametrize(
    ("url", "why"),
    [
        (f"postgresql://127.0.0.1:1/d?password={SECRET}", "postgresql+psycopg://127.0.0.1:1/d did"),
        (f"postgresql://u:{SECRET}@127.0.0.1:1/d", "postgresql+psycopg://127.0.0.1:1/d did"),
        (f"postgresql://u:x@{SECRET}@127.0.0.1:1/d", "%40"),
        (f"postgresql://u:x@a/{SECRET}@127.0.0.1:1/d", "%40"),
        (f"postgresql://u:{SECRET}@h:port/d", "cannot be read as a URL"),
        ("sqlite:///:memory:", "must be a file"),
        ("sqlite:///", "must be a file"),
        ("sqlite:///file:x?mode=memory&uri=true", "must be a file"),
        ("sqlite:////srv/a?b/dar.db", "written as %3F"),
        ("sqlite:////srv/dar.db?timeout=9", "takes no options"),
    ],
)
def test_a_database_that_cannot_be_used_is_named_without_its_password(
    start: Start, url: str, why: str
) -> None:
    code, said = start(migrate, DAR_DATABASE_URL=url, DAR_DATABASE_WAIT_SECONDS="0.01")
    assert code == 1
    assert said.count("\n") == 1
    assert "DAR_DATABASE_URL" in said
    assert why in said
    assert SECRET not in said


@pytest.mark.parametrize("value", ["", " \n"])
@pytest.mark.parametrize("name", ["api_key", "worker_key", "reward_secret", "secret_keys"])
def test_an_empty_key_or_secret_is_not_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str
) -> None:
    """The same for the service, workers, the SDK and commands: all read the file."""
    monkeypatch.setenv("DAR_HOME", str(tmp_path))
    monkeypatch.setenv(f"DAR_{name.upper()}", value)
    (tmp_path / name).write_text("from-the-file\n")
    settings = load_settings()
    assert getattr(settings, name) is None
    assert settings.secret_from(getattr(settings, name), name) == "from-the-file"
    with Client(base_url="http://127.0.0.1:9") if name == "api_key" else nullcontext():
        pass


VALUES = {
    "DAR_DATABASE_URL": "postgresql://dar:secret@db/dar",
    "DAR_BROKER_URL": "redis://:secret@valkey:6379/0",
}
"""Secrets that are not any text."""
SECRETS = {
    variable_of(name, field): name
    for name, field in Settings.model_fields.items()
    if is_secret(field.annotation)
}


@pytest.mark.parametrize("variable", SECRETS)
def test_every_secret_may_be_in_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    file, name = tmp_path / "secret", SECRETS[variable]
    value = VALUES.get(variable, "in-a-file")
    file.write_text(f"{value}\n")
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_TOKEN", "of-another-program")
    monkeypatch.setenv(f"{variable}_FILE", str(file))
    assert getattr(load_settings(), name).get_secret_value() == value
    assert getattr(load_settings(**{name: f"{value}2"}), name).get_secret_value() == f"{value}2"

    assert f"{variable}_FILE" not in environment((name,))
    assert f"{variable}_FILE" not in environment(**{name: value})

    monkeypatch.setenv(variable, SECRET)
    with pytest.raises(ConfigurationError, match=f"^both {variable} and {variable}_FILE are set"):
        load_settings()
    monkeypatch.setenv(variable, "")
    file.unlink()
    with pytest.raises(ConfigurationError, match=rf"{variable}_FILE: {file} cannot be read: No s"):
        load_settings()


def test_only_a_secret_may_be_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DAR_PORT_FILE", str(tmp_path / "none"))
    assert load_settings().port == Settings().port
    assert {"api_key", "worker_key", "secret_keys", "database_url"} <= set(SECRETS.values())


FOLDERS = ("DAR_HOME", "DAR_MODELS_DIR", "DAR_ARTIFACTS_DIR", "DAR_WORK_DIR")


def test_an_empty_folder_of_caches_is_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert Settings().cache_home == Path("~/.cache").expanduser()


@pytest.mark.parametrize("command", ["up", "demo", "serve", "worker", "migrate", "rotate-secrets"])
def test_an_empty_home_is_not_the_current_folder(command: str) -> None:
    ended = run_command(command, "--home", "", environment={})
    assert ended.returncode == 2
    assert "current folder" in ended.stderr


@pytest.mark.parametrize("main", [migrate, run_worker])
@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        *((name, "", "is empty") for name in FOLDERS),
        *((name, " ", "is empty") for name in FOLDERS),
        *((name, "~nosuchuser/x", "home of no user") for name in FOLDERS),
        ("DAR_NODE", "", "1 to 128 ASCII"),
        ("DAR_NODE", "b\u00fcro", "1 to 128 ASCII"),
        ("DAR_NODE", " n", "1 to 128 ASCII"),
        ("DAR_NODE", 129 * "x", "longer than 128"),
        ("DAR_SLOT", "", "1 to 128 ASCII"),
        ("DAR_SLOT", "\u00fc", "1 to 128 ASCII"),
        ("DAR_SLOT", 300 * "x", "longer than 128"),
        ("DAR_SLOT", 120 * "/", "longer than 128"),
        ("DAR_POLL_SECONDS", "1e300", "less than or equal to 31536000"),
        ("DAR_LEASE_TTL_SECONDS", "1e9", "less than or equal to 31536000"),
        ("DAR_REWARD_PROBE_SECONDS", "nan", "DAR_REWARD_PROBE_SECONDS"),
        ("DAR_TORCH_THREADS", "1000000000000", "less than or equal to 1024"),
    ],
)
def test_a_value_that_would_fail_later_is_refused_at_the_start(
    start: Start, main: Callable[[], int], name: str, value: str, why: str
) -> None:
    code, said = start(main, **{name: value})
    assert code in {1, 78}
    assert said.count("\n") == 1
    assert f"{name}: " in said
    assert why in said


@pytest.mark.parametrize("name", ["", "b\u00fcro", 300 * "x", "my machine"])
def test_a_machine_with_an_unusable_name_is_a_node_all_the_same(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("DAR_NODE", raising=False)
    monkeypatch.setattr("platform.node", lambda: name)
    settings = Settings()
    assert Settings(node=settings.node).node == settings.node
    assert claim_of(settings).node == settings.node


def serve() -> int:
    return run_service(["serve", "--port", "1"])


@pytest.mark.parametrize(
    ("main", "name"),
    [
        (migrate, "DAR_HOME"),
        (serve, "DAR_HOME"),
        (serve, "DAR_ARTIFACTS_DIR"),
        (run_worker, "DAR_WORK_DIR"),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_named_with_its_setting(
    start: Start, tmp_path: Path, main: Callable[[], int], name: str
) -> None:
    (tmp_path / "file").write_text("")
    given = {"DAR_WORKER_KEY": "dar-wk-1", "DAR_DATABASE_URL": f"sqlite:///{tmp_path}/dar.db"}
    code, said = start(main, **given, **{name: f"{tmp_path}/file"})
    assert code in {1, 78}
    assert f"{tmp_path}/file" in said
    assert "is not a folder" in said
    assert f"with {name}" in said


@pytest.mark.parametrize("name", ["DAR_EGRESS_ALLOW_HOSTS", "DAR_EGRESS_ALLOW_HTTP", "DAR_HOST"])
@pytest.mark.parametrize("value", ["http://x", "h:80", "a/b", "x*", "*.*", "a..b", "[::1]", "a b"])
def test_what_is_no_host_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}: .*neither the name of a host"):
        load_settings(**{name.removeprefix("DAR_").lower(): value})


@pytest.mark.parametrize("ports", ["99999", "-5", "0", "443,x"])
def test_what_is_no_port_is_refused(ports: str) -> None:
    with pytest.raises(ConfigurationError, match="DAR_EGRESS_PORTS: "):
        load_settings(egress_ports=ports)


def test_allowed_hosts_have_the_form_of_the_hosts_of_urls() -> None:
    given = "Rewards.Internal,*.B\u00fcro.example,host.,::1,*"
    written = ("rewards.internal", "*.xn--bro-hoa.example", "host", "::1", "*")
    assert load_settings(egress_allow_hosts=given).egress_allow_hosts == written


@pytest.mark.parametrize("secret", [SECRET, f"whsec_{SECRET}", "whsec_!!"])
@pytest.mark.parametrize("where", ["variable", "file"])
def test_a_reward_secret_that_cannot_sign_ends_the_start(
    start: Start, tmp_path: Path, secret: str, where: str
) -> None:
    given = {"DAR_REWARD_SECRET": secret} if where == "variable" else {}
    if where == "file":
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "reward_secret").write_text(secret)
    code, said = start(serve, **given)
    assert code == 1
    assert "DAR_REWARD_SECRET (or the file reward_secret): a reward secret is 'whsec_'" in said
    assert SECRET not in said


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("::1", "http://[::1]:8321"),
        ("::", "http://[::1]:8321"),
        ("fd00::5", "http://[fd00::5]:8321"),
        ("0.0.0.0", "http://127.0.0.1:8321"),
        ("judge.example", "http://judge.example:8321"),
    ],
)
def test_every_host_gives_a_url_that_clients_can_use(
    monkeypatch: pytest.MonkeyPatch, host: str, url: str
) -> None:
    monkeypatch.setenv("DAR_HOST", host)
    monkeypatch.delenv("DAR_PORT", raising=False)
    monkeypatch.delenv("DAR_BASE_URL", raising=False)
    assert load_settings().callback_url == f"{url}/v1/reward_callbacks"
    with Client("key") as client:
        assert client.base_url == url


def test_devices_are_numbers_or_ids_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("", "0", "0,1", "1, 0", "-1", "GPU-8932f937-d72c", "MIG-GPU-8932f937/1/2"):
        monkeypatch.setenv("DAR_DEVICES", given)
        assert load_settings().devices == given
    for given in ("x", "cuda:0", "0,", "0 1", "GPU-"):
        monkeypatch.setenv("DAR_DEVICES", given)
        with pytest.raises(ConfigurationError, match=r"DAR_DEVICES.*is not a list of GPUs"):
            load_settings()


@pytest.mark.parametrize("home", ["", "/missing"])
def test_the_doctor_and_a_backup_of_a_home_without_a_database_end_at_once_and_make_none(
    start: Start, tmp_path: Path, home: str
) -> None:
    here = tmp_path / home.lstrip("/")
    for command in (["audit"], ["backup", str(tmp_path / "backup")]):
        began = time.monotonic()
        code, said = start(lambda command=command: run_service(command), DAR_HOME=str(here))
        assert (code, f"{here} has no database dar.db" in said) == (1, True), said
        assert time.monotonic() - began < 5
    assert not list(tmp_path.glob("**/dar.db*"))


@pytest.mark.parametrize("command", ["backup", "restore"])
def test_an_empty_name_of_a_backup_is_not_the_current_folder(command: str) -> None:
    done = run_command(command, "", environment={})
    assert done.returncode == 2
    assert "it is empty, which would mean the current folder" in " ".join(
        done.stderr.replace("│", " ").split()
    )
