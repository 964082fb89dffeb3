"""A real S3 server out of a wheel: SeaweedFS."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from fakes.scripted_installation import free_port

REGION = "us-east-1"
BUCKET = "dar"
_PORTS = ("master", "volume", "filer", "s3", "admin")


@dataclass(frozen=True, slots=True)
class Identity:
    """Whoever signs requests."""

    access_key: str
    secret_key: str
    actions: tuple[str, ...]


SERVICE = Identity(
    "service-key", "service-secret", tuple(f"{verb}:{BUCKET}" for verb in ("Read", "Write", "List"))
)
"""May do everything in the bucket, but make no other."""
READER = Identity("reader-key", "reader-secret", (f"Read:{BUCKET}", f"List:{BUCKET}"))
"""Meets a bucket that is read-only."""
ADMIN = Identity("admin-key", "admin-secret", ("Admin",))


class SeaweedFS:
    """An S3 server with one bucket.

    Args:
        folder: Of its data.
        volumes: The most volumes that it makes; 0: as many as the disk allows. With few it is soon
            full. A change counts from the next start on.
        volume_megabytes: Size of a volume.
    """

    def __init__(self, folder: Path, *, volumes: int = 0, volume_megabytes: int = 128) -> None:
        self.folder = folder
        self._ports = {name: free_port() for name in _PORTS}
        self._grpc_ports = {name: free_port() for name in _PORTS}
        self.volumes, self.volume_megabytes = volumes, volume_megabytes
        self._prefixes = 0
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._write_identities(SERVICE)

    @property
    def port(self) -> int:
        return self._ports["s3"]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, name: str | None = None) -> str:
        """``s3://…``: a prefix of the bucket, of this caller alone unless it is named."""
        self._prefixes += 1
        return f"s3://{BUCKET}/{name or f'prefix-{self._prefixes}'}"

    def environment(
        self, identity: Identity = SERVICE, endpoint: str | None = None
    ) -> dict[str, str]:
        """The variables by which S3 clients find the server and sign."""
        return {
            "AWS_ACCESS_KEY_ID": identity.access_key,
            "AWS_SECRET_ACCESS_KEY": identity.secret_key,
            "AWS_REGION": REGION,
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ALLOW_HTTP": "true",
        }

    def client(self, identity: Identity = SERVICE, endpoint: str | None = None) -> Any:
        """A client that shares no code with the product's store."""
        return botocore.session.get_session().create_client(
            "s3",
            region_name=REGION,
            endpoint_url=endpoint or self.endpoint,
            aws_access_key_id=identity.access_key,
            aws_secret_access_key=identity.secret_key,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                retries={"total_max_attempts": 1},
                connect_timeout=5,
                read_timeout=20,
            ),
        )

    def names(self, url: str) -> list[str]:
        """Names of the objects below ``url``, each beginning after it."""
        prefix = url.removeprefix(f"s3://{BUCKET}/").rstrip("/") + "/"
        pages = (
            self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        )
        return [
            one["Key"].removeprefix(prefix) for page in pages for one in page.get("Contents", ())
        ]

    def start(self) -> None:
        """Start the server, also again after `kill`, and wait until it stores."""
        options = [
            *("-dir", str(self.folder / "data"), "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            f"-s3.config={self.folder / 'identities.json'}",
            *(f"-{name}.port={port}" for name, port in self._ports.items()),
            *(f"-{name}.port.grpc={port}" for name, port in self._grpc_ports.items()),
            *(f"-{name}.localSocket={self.folder / name}.sock" for name in ("filer", "s3")),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"),
            *("-admin.ui=false", "-webdav=false", "-master.telemetry=false"),
            *(f"-volume.max={self.volumes}", f"-master.volumeSizeLimitMB={self.volume_megabytes}"),
        ]
        (self.folder / "data").mkdir(exist_ok=True)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [Path(sys.executable).with_name("weed"), "mini", *options],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._wait()

    def _wait(self, seconds: float = 60.0) -> None:
        assert self.process is not None
        client = self.client(ADMIN)
        until = time.monotonic() + seconds
        while True:
            assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
            try:
                if BUCKET not in {one["Name"] for one in client.list_buckets()["Buckets"]}:
                    client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key="probe", Body=b"1")
            except (BotoCoreError, ClientError) as error:
                if time.monotonic() > until:
                    raise TimeoutError("SeaweedFS did not come up") from error
                time.sleep(0.05)
            else:
                return

    def _write_identities(self, service: Identity) -> None:
        identities = [
            {
                "name": one.access_key,
                "credentials": [{"accessKey": one.access_key, "secretKey": one.secret_key}],
                "actions": one.actions,
            }
            for one in (service, READER, ADMIN)
        ]
        (self.folder / "identities.json").write_text(json.dumps({"identities": identities}))

    def allow_writes(self, *, are_allowed: bool) -> None:
        """Let the service write, or only read, from now on."""
        assert self.process is not None
        actions = SERVICE.actions if are_allowed else READER.actions
        self._write_identities(Identity(SERVICE.access_key, SERVICE.secret_key, actions))
        self.process.send_signal(signal.SIGHUP)
        until, client = time.monotonic() + 10, self.client()
        while _can_write(client) != are_allowed:
            if time.monotonic() > until:
                raise TimeoutError("SeaweedFS has not read its identities again")
            time.sleep(0.05)

    def fill(self) -> None:
        """Store until there is no room."""
        client = self.client()
        for number in range(10_000):
            try:
                client.put_object(Bucket=BUCKET, Key=f"filling/{number}", Body=bytes(1_000_000))
            except ClientError:
                return
        raise RuntimeError("SeaweedFS has too much room")

    def kill(self) -> None:
        """Kill the server, as a loss of power does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        for name, port in self._grpc_ports.items():  # a killed server leaves them
            Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock").unlink(missing_ok=True)


def _can_write(client: Any) -> bool:
    try:
        client.put_object(Bucket=BUCKET, Key="probe", Body=b"1")
    except ClientError:
        return False
    return True
