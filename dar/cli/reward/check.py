"""``dar reward check``: from the options to a probe, and from its report to the exit code."""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import typer
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from dar.cli.reward.listener import listening
from dar.cli.reward.screen import ReportScreen
from dar.client import Client
from dar.errors import ConfigurationError
from dar.protocol.reward_endpoints import ProbeSample
from dar.protocol.reward_probe import ProbeReport
from dar.protocol.reward_spec import RewardComponent
from dar.rewards.http.egress import parse_url
from dar.rewards.http.redaction import check_header_name, check_headers
from dar.rewards.http.signing import secrets_in, secrets_in_file
from dar.rewards.probe.client import ProbeTarget
from dar.rewards.probe.run import as_samples, probe
from dar.setting_kinds import is_loopback
from dar.settings import load_settings

EXIT_ERRORS = 1
ENDPOINT_PREFIX = "rwe_"
MIN_SAMPLES, MAX_SAMPLES = 2, 8
_SAMPLE = TypeAdapter(ProbeSample)


@dataclass(frozen=True, slots=True)
class Options:
    """The command-line options."""

    secret_file: Path | None
    is_unsigned: bool
    headers: Sequence[str]
    protocol: str | None
    component: Path | None
    samples: Path | None
    reply: str | None
    is_light: bool
    concurrency: int | None
    max_samples: int | None
    timeout: float | None
    as_json: bool


def run(service: str, options: Options) -> None:
    """Probe ``service`` and show the report.

    Raises:
        typer.Exit: With 1 if the report has errors.
        typer.BadParameter: An option or a file cannot be used.
    """
    samples = None if options.samples is None else _read_samples(options.samples)
    screen = ReportScreen(sys.stdout)
    with screen.waiting(service):
        if service.startswith(ENDPOINT_PREFIX):
            report = _probe_by_service(service, options, samples)
        else:
            report = asyncio.run(_probe_here(_target(service, options, samples), samples, options))
    if options.as_json:
        # Only ASCII, so that it is JSON in every encoding.
        sys.stdout.write(json.dumps(report.model_dump(mode="json")) + "\n")
    else:
        screen.show(service, report)
    if not report.ok:
        raise typer.Exit(EXIT_ERRORS)


def _probe_by_service(
    endpoint_id: str, options: Options, samples: Sequence[ProbeSample] | None
) -> ProbeReport:
    given = {
        "--secret-file": options.secret_file,
        "--unsigned": options.is_unsigned,
        "--header": options.headers,
        "--protocol": options.protocol,
        "--component": options.component,
        "--reply": options.reply,
        "--concurrency": options.concurrency,
        "--max-samples": options.max_samples,
        "--timeout": options.timeout,
    }
    named = [name for name, value in given.items() if value]
    if named:
        raise typer.BadParameter(f"{named[0]} is for URLs; an endpoint has its own settings")
    sent = None if samples is None else [one.model_dump(exclude_unset=True) for one in samples]
    with Client() as client:
        return client.reward_endpoints.probe(endpoint_id, samples=sent, light=options.is_light)


async def _probe_here(
    target: ProbeTarget, samples: Sequence[ProbeSample] | None, options: Options
) -> ProbeReport:
    given = as_samples(samples)
    if target.component.reply != "either" or not is_loopback(parse_url(target.url, None).host):
        return await probe(target, given, light=options.is_light)
    async with listening() as inbox:
        return await probe(replace(target, inbox=inbox), given, light=options.is_light)


def _target(url: str, options: Options, samples: Sequence[ProbeSample] | None) -> ProbeTarget:
    given = _read_component(options.component)
    if given.get("url", url) != url:  # neither is shown, as it may hold a token
        raise typer.BadParameter(
            f"{options.component} has another url than the one that is to be checked; leave url out "
            "of the file, or give its url on the command line"
        )
    fields: dict[str, Any] = {"name": "checked", **given, "url": url}
    fields.pop("endpoint", None)
    if options.protocol is not None:
        fields["protocol"] = options.protocol
    if options.reply is not None:
        fields["reply"] = options.reply
    if options.concurrency is not None:
        fields["limits"] = {**fields.get("limits", {}), "concurrency": options.concurrency}
    if options.max_samples is not None:
        fields["batch"] = {**fields.get("batch", {}), "max_samples": options.max_samples}
    if options.timeout is not None:
        seconds = options.timeout
        times = {"read": min(seconds, 600.0), "attempt": seconds, "deadline": seconds}
        fields["timeouts"] = {**fields.get("timeouts", {}), **times}
    if "columns" not in fields:
        names = {name for sample in samples or () for name in sample.columns}
        fields["columns"] = sorted(names) or None
    try:
        component = RewardComponent.model_validate(fields)
    except ValidationError as error:
        _reject(error, "the component")
    if component.kind != "http":
        raise typer.BadParameter(f"a component of kind {component.kind} has no service to check")
    return ProbeTarget(component, url, _secrets(options), _headers(options.headers))


def _secrets(options: Options) -> list[str]:
    if options.is_unsigned:
        return []
    path = options.secret_file
    if path is None:
        settings = load_settings()
        if settings.reward_secret is not None:
            return secrets_in(settings.reward_secret.get_secret_value())
        path = settings.home / "reward_secret"
        if not path.is_file():
            return []
    _read(path)
    try:
        return secrets_in_file(path.expanduser())
    except ConfigurationError as error:
        raise typer.BadParameter(error.message) from None


def _headers(given: Sequence[str]) -> Mapping[str, str]:
    try:
        headers = _parsed_headers(given)
        check_headers(headers)
    except ConfigurationError as error:
        raise typer.BadParameter(error.message) from None
    return headers


def _parsed_headers(given: Sequence[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not separator or ":" in name:
            raise typer.BadParameter("write a header as NAME=VALUE or NAME=@FILE")
        check_header_name(name)
        if name in headers:
            raise typer.BadParameter(f"the header {name!r} is given twice; give it once")
        headers[name] = _read(Path(value[1:])).strip() if value.startswith("@") else value
    return headers


def _read_component(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = from_json(_read(path))  # unlike the json module, it limits the depth
    except ValueError as error:
        raise typer.BadParameter(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise typer.BadParameter(f"{path} must hold one JSON object")
    return content


def _read_samples(path: Path) -> list[ProbeSample]:
    # A text may hold other line ends than those of JSON Lines, such as U+2028.
    lines = [line for line in _read(path).split("\n") if line.strip()]
    if not MIN_SAMPLES <= len(lines) <= MAX_SAMPLES:
        raise typer.BadParameter(
            f"{path} has {len(lines)} samples; a probe takes {MIN_SAMPLES} to {MAX_SAMPLES}"
        )
    found: list[ProbeSample] = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(_SAMPLE.validate_json(line))
        except ValidationError as error:
            _reject(error, f"{path}, sample {number}")
    return found


def _read(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise typer.BadParameter(f"{path} cannot be read: {why}") from None


def _reject(error: ValidationError, what: str) -> NoReturn:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    raise typer.BadParameter(": ".join(filter(None, [what, where, first["msg"]])))
