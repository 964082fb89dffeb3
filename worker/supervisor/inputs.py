"""Downloads an attempt's files to this machine: resumable, and verified by SHA-256."""

import contextlib
import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import structlog

from dar.disk import file_sha256
from dar.errors import ConflictError, FencedError, ServiceUnavailableError
from dar.protocol.worker import REWARD_MODELS, InputFile
from worker.api import GaveUpError, WorkerClient
from worker.failures import NETWORK
from worker.models.fetching import MODEL, ModelFetcher, check_room
from worker.models.local import InputFetchError, arriving, bytes_to_arrive, safe_path
from worker.store_client import StoreClient
from worker.supervisor.state import AttemptState

log = structlog.get_logger(__name__)

Answer = TypeVar("Answer")
RESUME = "resume"
"""Folder of the checkpoint that an attempt resumes from."""
LOOK_SECONDS = 0.1
VERIFY_ATTEMPTS = 3


class InputDamagedError(InputFetchError):
    """A file arrived altered each time, or the service has only a part of it."""


@dataclass(frozen=True, slots=True)
class LocalInputs:
    """Paths of an attempt's files on this machine."""

    training_file: Path | None
    """None: the job names a data set of the hub."""
    validation_file: Path | None
    model_folder: Path | None
    """None: only the cache of the hub's library may have the model."""
    adapters: tuple[Path, ...]
    resume_from: Path | None
    reward_models: Mapping[str, Path] = field(default_factory=dict)
    """Folders by component name; only the cache of the hub's library may have the others."""


class InputFetcher:
    """Fetches the inputs of one attempt."""

    def __init__(self, state: AttemptState, client: WorkerClient, models: ModelFetcher) -> None:
        self._state = state
        self._lease = state.lease
        self._client = client
        self._models = models
        self._folder = state.folder.inputs
        self._store = StoreClient(state.must_stop)
        self._urls: Mapping[tuple[str, str], str] = {}
        """Where the store has an input, by its name and digest; the service sends the others."""

    def fetch(self) -> LocalInputs:
        """Download all files that are missing; waits while the service is unreachable.

        If the checkpoint to resume from is damaged, the next older one is fetched.

        Raises:
            InputFetchError: A file cannot be downloaded.
            ModelNotFoundError: A model was removed after the submission, or the hub refuses it.
            HubUnreachableError: The hub does not answer, and this host lacks a model of it.
            GaveUpError: The attempt must stop.
            DARError: The service rejects the request.
        """
        while True:
            try:
                return self._fetch()
            except InputDamagedError as error:
                self._replace_damaged(error)

    def _replace_damaged(self, error: InputDamagedError) -> None:
        """Make the service replace a damaged checkpoint.

        Raises:
            InputFetchError: Its files are whole, or another input than the resume is damaged.
        """
        damaged = self._in_background(
            lambda: self._client.check_inputs(self._lease.lease_id, self._lease.attempt).damaged
        )
        if not damaged:
            raise InputFetchError(
                f"{error.message}, though the service has it unaltered", code=NETWORK.code
            ) from error
        if damaged != [RESUME]:
            others = ", ".join(name for name in damaged if name != RESUME)
            raise InputFetchError(
                f"{error.message}; damaged in the artifact store: {others}", code="input_altered"
            )
        log.warning("checkpoint is damaged; an older one is fetched", error=error.message)
        shutil.rmtree(self._folder / RESUME, ignore_errors=True)

    def _in_background(self, call: Callable[[], Answer]) -> Answer:
        """The result of a call that takes long, unless the attempt must stop before.

        Raises:
            GaveUpError: It must stop.
        """
        answers: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()

        def work() -> None:
            try:
                answers.put(self._until_answered(call, "check of inputs"))
            except Exception as error:  # noqa: BLE001 - the waiting thread raises it again
                answers.put(error)

        threading.Thread(target=work, name="check-inputs", daemon=True).start()
        while not self._state.must_stop():
            with contextlib.suppress(queue.Empty):
                answer = answers.get(timeout=LOOK_SECONDS)
                if isinstance(answer, Exception):
                    raise answer
                return answer
        raise GaveUpError("check of inputs")

    def _fetch(self) -> LocalInputs:
        lease_id = self._lease.lease_id
        inputs = self._until_answered(lambda: self._client.inputs(lease_id), "inputs")
        files, self._state.resume_checkpoint_id = inputs.files, inputs.resume_checkpoint_id
        self._note_urls(files)
        models = self._models.fetch(files, self._fetch_one)
        of_models = tuple(f"{prefix}/" for prefix in models)
        wanted = [file for file in files if not file.name.startswith(of_models)]
        sizes = {file.name: file.bytes for file in wanted}
        check_room(self._folder, bytes_to_arrive(self._folder, sizes))
        for file in wanted:
            self._fetch_one(file, safe_path(self._folder, file.name))
        resumes = any(file.name.startswith(f"{RESUME}/") for file in wanted)
        return LocalInputs(
            training_file=self._uploaded("training_file", wanted),
            validation_file=self._uploaded("validation_file", wanted),
            model_folder=models.get(MODEL),
            adapters=tuple(
                self._folder / "adapters" / str(number)
                for number in range(len(self._lease.model.adapter_ids))
            ),
            resume_from=self._folder / RESUME if resumes else None,
            reward_models={
                prefix.removeprefix(f"{REWARD_MODELS}/"): folder
                for prefix, folder in models.items()
                if prefix != MODEL
            },
        )

    def _uploaded(self, name: str, files: Iterable[InputFile]) -> Path | None:
        return self._folder / name if any(file.name == name for file in files) else None

    def _until_answered(self, call: Callable[[], Answer], what: str) -> Answer:
        return self._client.until_answered(call, what, give_up=self._state.must_stop)

    def _fetch_one(self, file: InputFile, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        part, shown = arriving(target), self._state.first_progress
        for _ in range(VERIFY_ATTEMPTS):
            try:
                self._until_answered(
                    lambda: self._shown(lambda: self._download(file, part)),
                    f"download {file.name}",
                )
                self._state.first_progress = shown
            except FencedError:
                raise
            except ConflictError as error:  # the service has only a part of it
                raise InputDamagedError(error.message) from error
            if file_sha256(part) == file.sha256:
                part.replace(target)
                return
            log.warning("input arrived altered", name=file.name)
            part.unlink()
        raise InputDamagedError(
            f"{file.name} arrived altered {VERIFY_ATTEMPTS} times: its SHA-256 differs",
            code="input_altered",
        )

    def _shown(self, call: Callable[[], None]) -> None:
        """Make a call; the job shows why it failed until another one succeeds."""
        try:
            call()
        except ServiceUnavailableError as error:
            message = f"waiting for its inputs: {error.message}"[:2000]
            changes = {"message": message}
            self._state.first_progress = self._state.first_progress.model_copy(update=changes)
            raise

    def _download(self, file: InputFile, part: Path) -> None:
        with part.open("ab") as out:

            def take(chunks: Iterable[bytes]) -> None:
                for chunk in chunks:
                    if self._state.must_stop():
                        raise GaveUpError(file.name)
                    out.write(chunk)

            if out.tell() < file.bytes:
                self._receive(file, out.tell(), take)

    def _receive(
        self, file: InputFile, offset: int, take: Callable[[Iterable[bytes]], None]
    ) -> None:
        lease_id, url = self._lease.lease_id, self._urls.get((file.name, file.sha256))
        if url is None:
            self._client.download(lease_id, file.name, offset, take)
            return
        try:
            self._store.get(url, offset, take)
        except ServiceUnavailableError:
            self._note_urls(self._client.inputs(lease_id).files)  # this one may have expired
            raise

    def _note_urls(self, files: Iterable[InputFile]) -> None:
        self._urls = {(file.name, file.sha256): file.url for file in files if file.url is not None}
