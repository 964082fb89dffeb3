"""The service's processes: ``python -m service`` with one of the commands below."""

import gc

if __name__ == "__main__":
    # Imported objects all stay, and searching them for garbage takes a seventh of the start.
    gc.disable()

import argparse
import json
import os
import signal
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from dar.disk import PRIVATE
from dar.errors import DARError
from dar.output import written_output
from dar.setting_kinds import host_and_port
from dar.settings import Settings, load_settings
from service import audit, keys, migrate
from service.app import create_app, prepare
from service.artifacts import Artifacts
from service.backup import backup, move, restore
from service.backup.manifest import BackupManifest
from service.http import connections, log
from service.secret_box import SecretBox
from service.storage.opening import open_storage
from service.store import project_secrets, reward_secrets
from service.store.database import Database, Transaction

GRACE_SECONDS = 4
"""How long a running request may take to end when the service stops."""


class Server(uvicorn.Server):
    """uvicorn that logs when it is ready, and ends long polls when it stops."""

    def __init__(self, app: FastAPI, config: connections.ConnectionConfig) -> None:
        super().__init__(config)
        self._app = app
        self._max_connections = config.max_connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start serving, then log the address."""
        await super().startup(sockets)
        if self.started:
            for server in self.servers:
                for opened in server.sockets:
                    host, port = opened.getsockname()[:2]
                    structlog.get_logger().info(
                        "ready",
                        url=f"http://{host_and_port(host, port)}",
                        max_connections=self._max_connections,
                    )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, and end all long polls."""
        runtime = getattr(self._app.state, "runtime", None)
        if runtime is not None:
            runtime.notifier.release()
        super().handle_exit(sig, frame)


def main(arguments: list[str] | None = None) -> int:
    """Run one of the service's processes. Returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m service", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serve_parser = commands.add_parser("serve", help="serve the API")
    serve_parser.add_argument("--host", help="address to bind to (default: DAR_HOST)")
    serve_parser.add_argument("--port", type=int, help="port to bind to (default: DAR_PORT)")
    commands.add_parser("migrate", help="upgrade the database schema and stop")
    commands.add_parser("rotate-secrets", help="store all secrets under the newest key and stop")
    audit_parser = commands.add_parser("audit", help="check that nothing was lost or doubled")
    audit_parser.add_argument("--acknowledged", type=Path, help="JSON lines with job_id and key")
    audit_parser.add_argument("--quick", action="store_true", help="read no file of a checkpoint")
    audit_parser.add_argument("--json", action="store_true", help="print one JSON object")
    backup_parser = commands.add_parser("backup", help="back everything up and stop")
    backup_parser.add_argument("folder", type=Path, help="new folder of the backup")
    backup_parser.add_argument("--copy", action="store_true", help="copy files, link none")
    backup_parser.add_argument(
        "--with-secret-keys", action="store_true", help="include secret_keys"
    )
    restore_parser = commands.add_parser("restore", help="restore a backup and stop")
    restore_parser.add_argument("folder", type=Path, help="folder of the backup")
    move_parser = commands.add_parser("move-storage", help="copy all files elsewhere and stop")
    move_parser.add_argument("target", help="folder or s3://bucket/prefix")
    move_parser.add_argument("--quick", action="store_true", help="read no file there again")
    chosen = parser.parse_args(arguments)
    os.umask(PRIVATE)
    log.configure("info")
    try:
        if chosen.command in BY_HAND:
            return BY_HAND[chosen.command](chosen)
        if chosen.command == "migrate":
            return _migrate(load_settings())
        if chosen.command == "rotate-secrets":
            return _rotate_secrets(load_settings())
        if chosen.command == "audit":
            return _audit(load_settings(), chosen)
        return _serve(load_settings(host=chosen.host, port=chosen.port))
    except DARError as error:
        if chosen.command in BY_HAND:
            sys.stderr.write(f"dar: {error.message}\n")
            return 1
        structlog.get_logger().error("cannot start", code=error.error_code, message=error.message)
    except OSError as error:
        if chosen.command in BY_HAND:
            sys.stderr.write(f"dar: {error}; mend that, then run the command again\n")
            return 1
        structlog.get_logger().error("cannot start", code="os_error", message=str(error))
    return 1


def _migrate(settings: Settings) -> int:
    log.configure(settings.log_level)
    database = Database(settings.sqlalchemy_url)
    migrate.upgrade(settings.model_copy(update={"is_migrating": True}), database)
    structlog.get_logger().info("schema is up to date", revision=migrate.current(database))
    database.close()
    return 0


def _rotate_secrets(settings: Settings) -> int:
    log.configure(settings.log_level)
    database = Database(settings.sqlalchemy_url)
    migrate.upgrade(settings, database)
    secrets = SecretBox(keys.secret_keys(settings, database))

    def work(transaction: Transaction) -> int:
        project_secrets.renew(transaction, secrets)
        return reward_secrets.rotate(transaction, secrets)

    count = database.transact(work)
    structlog.get_logger().info("secrets are stored under the newest key", count=count)
    database.close()
    return 0


def _audit(settings: Settings, chosen: argparse.Namespace) -> int:
    """Print what the auditor finds. Returns 1 if it finds anything."""
    log.configure(settings.log_level)
    with written_output("dar doctor"):
        database = Database(settings.sqlalchemy_url)
        database.check_exists()
        database.wait(settings.database_wait_seconds)
        migrate.check_current(database)
        acknowledged = audit.read_acknowledged(chosen.acknowledged) if chosen.acknowledged else ()
        artifacts = Artifacts(open_storage(settings))
        report = audit.audit(database, artifacts, acknowledged, is_hashing=not chosen.quick)
        database.close()
        lines = audit.lines(report)
        print(json.dumps(asdict(report)) if chosen.json else "\n".join(lines))  # noqa: T201 - the command's result
    return 1 if report.findings else 0


def _back_up(chosen: argparse.Namespace) -> int:
    manifest = backup.take(
        load_settings(),
        chosen.folder,
        is_copying=chosen.copy,
        has_secret_keys=chosen.with_secret_keys,
    )
    for problem in manifest.damaged:
        sys.stderr.write(f"dar: {problem}, and not in the backup\n")
    _say(manifest, f"backed up to {chosen.folder}")
    if not chosen.with_secret_keys:
        sys.stdout.write(
            "secret_keys is not in it: keep that file in another place, because stored secrets of "
            "reward endpoints need it\n"
        )
    return 0


def _restore(chosen: argparse.Namespace) -> int:
    settings = load_settings()
    manifest = restore.restore(settings, chosen.folder)
    _say(manifest, f"restored to {settings.home}")
    for job_id in manifest.unfinished_jobs:
        sys.stdout.write(f"  {job_id} had not ended and goes on\n")
    sys.stdout.write(
        "What was submitted, trained or deleted later is not in it. A worker that runs a later job "
        "stops it, and both logs name the job.\n"
    )
    if not (settings.home / keys.KEYS_OF_SECRETS_FILE).exists() and settings.secret_keys is None:
        sys.stdout.write(
            f"secret_keys was not in it: put the file into {settings.home} before the first start if "
            "jobs use registered reward endpoints\n"
        )
    return 0


def _move(chosen: argparse.Namespace) -> int:
    """Print what was copied and what is to be done next. Returns 1 if a file was not copied."""
    target = load_settings(storage_url=chosen.target)
    done = move.move(load_settings(), open_storage(target), is_quick=chosen.quick)
    for name, why in sorted(done.damaged.items()):
        sys.stderr.write(f"dar: {name} is {why} in {done.source}, and was not copied\n")
    how = "all verified" if not chosen.quick else "the copied ones verified"
    sys.stdout.write(
        f"{done.target} has {done.files:,} files, {done.bytes:,} bytes, of which {done.copied:,} files "
        f"were copied now, {how}; {done.source} keeps its own\n"
    )
    if done.copied:
        sys.stdout.write(
            "Next: stop the service, and run this command again with --quick for what was stored "
            "meanwhile\n"
        )
    else:
        sys.stdout.write(
            f"Next: start the service with DAR_STORAGE_URL={chosen.target}, if it did not run now\n"
        )
    return 1 if done.damaged.keys() - done.set_aside else 0


def _say(manifest: BackupManifest, what: str) -> None:
    size = sum(file.bytes for file in manifest.files)
    sys.stdout.write(
        f"{what}: the state of {manifest.created_at}, {manifest.jobs} jobs, "
        f"{len(manifest.files)} files, {size:,} bytes, all verified\n"
    )


BY_HAND = {"backup": _back_up, "restore": _restore, "move-storage": _move}
"""Commands that say what went wrong in a sentence, and log nothing."""


def _serve(settings: Settings) -> int:
    log.configure(settings.log_level)
    app = create_app(settings, prepare(settings))
    config = connections.ConnectionConfig(
        app,
        max_connections=connections.max_connections(connections.raise_file_limit()),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = Server(app, config)
    for number in (signal.SIGTERM, signal.SIGINT):
        # After a graceful stop uvicorn raises the signal again. Without a handler it would kill the
        # process.
        signal.signal(number, lambda _number, _frame: None)
    server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    sys.exit(main())
