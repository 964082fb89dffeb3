"""Keys with the SDK and with `dar keys`, as an operator makes, lists and revokes them."""

import json
from typing import Any

import pytest

from dar.client import Client
from dar.errors import AuthenticationError, InvalidRequestError
from fakes.command_line import run_command


def test_an_operator_makes_lists_and_revokes_keys_from_the_command_line(
    client: Client, service: Any
) -> None:
    environment = {"DAR_BASE_URL": service.url, "DAR_API_KEY": service.api_key}
    options = ("--scope", "worker", "--node", "gpu-7", "--expires", "90d", "--name", "rack 3")
    made = run_command("keys", "create", *options, environment=environment)
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    assert key.startswith("dar-wk-")
    assert key not in made.stderr
    listed = run_command("keys", "list", environment=environment)
    assert key not in listed.stdout
    line = listed.stdout.splitlines()[0]
    assert all(word in line for word in ("valid", "worker", "node gpu-7", "never used", "rack 3"))
    key_id = line.split()[0]
    found = client.api_keys.retrieve(key_id)
    assert found.expires_at is not None
    assert found.expires_at - found.created_at == 90 * 86_400
    ended = run_command("keys", "revoke", key_id, environment=environment)
    assert "revoked" in ended.stdout
    assert next(iter(client.api_keys.list())).state == "revoked"
    shown = run_command("keys", "list", "--json", environment=environment).stdout.splitlines()
    assert json.loads(shown[0])["state"] == "revoked"
    wrong = run_command(
        "keys", "create", "--scope", "read", "--expires", "soon", environment=environment
    )
    assert (wrong.returncode, "like 90d" in wrong.stderr) == (2, True)


def test_a_key_made_with_the_sdk_opens_what_its_scopes_say(client: Client) -> None:
    made = client.api_keys.create(["read"], expires_in_seconds=60)
    assert made.key not in repr(made)
    with Client(made.key, client.base_url) as reader:
        assert list(reader.jobs.list(limit=1).page().data) is not None
    client.api_keys.revoke(made)
    with Client(made.key, client.base_url) as reader, pytest.raises(AuthenticationError):
        reader.jobs.list().page()
    with pytest.raises(InvalidRequestError):
        client.api_keys.create(["worker", "read"])
