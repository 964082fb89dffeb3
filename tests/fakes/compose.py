"""What ``docker/`` says about each container, read from its files."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

DOCKER = Path(__file__).parents[2] / "docker"
USUAL = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
VARIABLE = re.compile(r"\$\{([A-Z0-9_]+):-([^}]*)\}")


@dataclass(frozen=True)
class Image:
    """The last stage of a Dockerfile."""

    variables: Mapping[str, str]
    user: str
    entrypoint: list[str]
    command: list[str]
    health: list[str]
    volumes: list[str]


@dataclass
class Container:
    """A service of a compose file, with what its image adds."""

    name: str
    command: list[str]
    variables: dict[str, str]
    user: str
    volumes: dict[str, str]
    """Path in the container -> folder or file of the host, or name of a volume."""
    secrets: dict[str, str]
    """Name -> file of the host."""
    tmpfs: list[str]
    health: list[str]
    stop_signal: str
    stop_seconds: float
    needs: dict[str, str] = field(default_factory=dict)
    """Container that is started before -> condition."""
    hardening: dict[str, Any] = field(default_factory=dict)


def interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    """``value`` with ``${NAME:-default}`` replaced, as compose does."""
    if isinstance(value, dict):
        return {key: interpolated(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolated(item, variables) for item in value]
    if not isinstance(value, str):
        return value
    found = VARIABLE.sub(lambda match: variables.get(match[1]) or match[2], value)
    assert "${" not in found, f"a variable without a default: {value}"
    return found


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Word and arguments of each instruction, with continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(word.upper(), rest.strip()) for word, _, rest in found]


def image_of(dockerfile: Path) -> Image:
    variables: dict[str, str] = {}
    last: dict[str, str] = {}
    for word, rest in instructions(dockerfile):
        if word == "FROM":
            variables, last = dict(USUAL), {}
        elif word == "ENV":
            variables |= dict(part.split("=", 1) for part in shlex.split(rest))
        else:
            last[word] = rest

    def words(text: str) -> list[str]:
        return list(json.loads(text)) if text.startswith("[") else text.split()

    return Image(
        variables=variables,
        user=last.get("USER", "0:0"),
        entrypoint=words(last.get("ENTRYPOINT", "[]")),
        command=words(last.get("CMD", "[]")),
        health=words(last.get("HEALTHCHECK", "").partition("CMD ")[2] or "[]"),
        volumes=words(last.get("VOLUME", "[]")),
    )


def seconds(text: str) -> float:
    units = {"s": 1.0, "m": 60.0}
    return float(text[:-1]) * units[text[-1]]


def _check(test: list[str]) -> list[str]:
    """The command of a health check."""
    if test[:1] == ["CMD-SHELL"]:
        return ["sh", "-c", test[1]]
    return test[1:] if test[:1] == ["CMD"] else test


def _merged(base: Any, over: Any) -> Any:
    """How ``extends`` joins two values: mappings by key, lists one after the other."""
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {
            key: _merged(base[key], item) if key in base else item for key, item in over.items()
        }
    if isinstance(base, list) and isinstance(over, list):
        return base + [item for item in over if item not in base]
    return over


def _service(services: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    service = dict(services[name])
    extended = service.pop("extends", None)
    if extended is None:
        return service
    others = yaml.safe_load((folder / extended["file"]).read_text())["services"]
    joined: dict[str, Any] = _merged(_service(others, extended["service"], folder), service)
    return joined


def containers(compose: Path, **variables: str) -> dict[str, Container]:
    """Every service of a compose file.

    Args:
        compose: The file; what it names lies beside it.
        **variables: As in ``.env``.
    """
    folder = compose.parent
    content = yaml.safe_load(compose.read_text())
    named = interpolated(content.get("secrets", {}), variables)
    found = {}
    for name in content["services"]:
        service = interpolated(_service(content["services"], name, folder), variables)
        build = service.get("build")
        image = (
            Image(USUAL, "0:0", [], [], [], [])
            if build is None
            else image_of(DOCKER.parent / "docker" / Path(build["dockerfile"]).name)
        )
        mounts = [text.split(":") for text in service.get("volumes", [])]
        health = service.get("healthcheck", {}).get("test", image.health)
        found[name] = Container(
            name=name,
            command=[*image.entrypoint, *service.get("command", image.command)],
            variables={**image.variables, **service.get("environment", {})},
            user=service.get("user", image.user),
            volumes={
                path: str(folder / source) if source.startswith((".", "/")) else source
                for source, path, *_ in mounts
            },
            secrets={
                secret: str(folder / named[secret]["file"]) for secret in service.get("secrets", [])
            },
            tmpfs=service.get("tmpfs", []),
            health=_check(health),
            stop_signal=service.get("stop_signal", "SIGTERM"),
            stop_seconds=seconds(service.get("stop_grace_period", "10s")),
            needs={
                other: condition["condition"]
                for other, condition in service.get("depends_on", {}).items()
            },
            hardening={
                key: service.get(key)
                for key in ("read_only", "cap_drop", "cap_add", "security_opt", "init", "restart")
            },
        )
    return found
