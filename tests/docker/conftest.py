"""The containers of ``docker/compose.yaml`` as processes, and clients that reach them by TLS."""

import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from dar.processes import answers
from dar.settings import environment
from fakes.compose import DOCKER
from fakes.containers import Containers, is_possible
from fakes.installation import REWARD_SERVICE, eventually

OWN = ("service-1", "service-2", "worker-0", "worker-1")


@dataclass
class Cluster:
    """An installation behind its proxy."""

    containers: Containers
    reward_url: str
    key: str
    opened: list[httpx.Client] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"https://{self.containers.addresses['proxy']}:8443/v1"

    def client(self, **options: Any) -> openai.OpenAI:
        """The client of users, which trusts the authority of the proxy."""
        root = self.containers.volume("proxy") / "caddy/pki/authorities/local/root.crt"
        eventually(root.exists, 20, "the authority of the proxy")
        context = ssl.create_default_context(cafile=str(root))
        http = httpx.Client(verify=context, trust_env=False, timeout=30)
        self.opened.append(http)
        return openai.OpenAI(api_key=self.key, base_url=self.url, http_client=http, **options)

    def spec(self, file_id: str, steps: int) -> dict[str, Any]:
        dar = {
            "hyperparameters": {"max_steps": steps, "batch_size": 6, "learning_rate": 2e-3},
            "sampling": {"max_new_tokens": 12},
            "rewards": {"components": [{"name": "letters", "url": self.reward_url}]},
            "checkpointing": {"every_steps": 5, "keep_last": 2},
        }
        return {
            "model": "base",
            "training_file": file_id,
            "seed": 11,
            "method": {"type": "dar", "dar": dar},
        }


@pytest.fixture(scope="session")
def cluster(
    tmp_path_factory: pytest.TempPathFactory,
    free_port: Callable[[], int],
    reviews_base: Path,
    end_of_folder: Callable[[Path], ExitStack],
) -> Cluster:
    """All containers, started as ``docker compose up`` starts them."""
    if not is_possible():
        pytest.skip("containers without an engine need Linux, root, unshare and Caddy's wheel")
    ends = end_of_folder(Path(__file__).parent)
    folder = tmp_path_factory.mktemp("cluster")
    copy = folder / "docker"
    shutil.copytree(DOCKER, copy, ignore=shutil.ignore_patterns("secrets", "models", ".env"))
    shutil.copytree(reviews_base / "model", copy / "models" / "base")
    shutil.copytree(copy / "models" / "base", copy / "models" / "closed")
    (copy / "models" / "closed" / "model.safetensors").chmod(0o600)
    for file in (copy / "models" / "base").iterdir():
        file.chmod(
            0o644
        )  # of the owner alone, as they are saved, the user of a container reads none
    subprocess.run([copy / "secrets.sh"], check=True, capture_output=True)
    port = free_port()
    made = Containers(
        folder,
        copy / "compose.yaml",
        DAR_EGRESS_ALLOW_CIDRS="127.0.0.0/8",
        DAR_EGRESS_ALLOW_HTTP="127.0.0.1",
    )
    ends.callback(made.close)
    program = folder / "reward.py"
    program.write_text(REWARD_SERVICE)
    reward = subprocess.Popen(
        [sys.executable, str(program), str(port), str(copy / "secrets" / "reward_secret")],
        env=environment(home=folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    ends.callback(reward.wait)
    ends.callback(reward.kill)
    for name in made.made:
        if name not in made.processes:
            made.start(name)
    for name in OWN:
        made.until_healthy(name)
    eventually(lambda: answers(f"http://127.0.0.1:{port}/healthz"), 30, "the reward service")
    key = (copy / "secrets" / "api_key").read_text().strip()
    return Cluster(made, f"http://127.0.0.1:{port}/score", key)


@pytest.fixture
def users(cluster: Cluster) -> Iterator[Callable[..., openai.OpenAI]]:
    """Makes clients, and closes them."""
    yield cluster.client
    while cluster.opened:
        cluster.opened.pop().close()
