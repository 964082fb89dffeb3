"""Training jobs, with their metrics, samples and events."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from ulid import ULID

from dar.client.arguments import HasId, id_of, in_path, mapping, texts
from dar.client.paging import Listing
from dar.client.stream import follow
from dar.client.transport import Transport, check_seconds
from dar.client.waiting import (
    Following,
    OnPause,
    Watch,
    ended,
    log_steps,
    metric_steps,
)
from dar.errors import ConfigurationError
from dar.protocol.base import Deleted, Page
from dar.protocol.events import Event
from dar.protocol.job_config import JobConfig
from dar.protocol.job_validation import JobValidation
from dar.protocol.jobs import Attempt, Job, JobLog, LogLevel
from dar.protocol.metrics import JobMetrics, Metrics, ReportedMetric
from dar.protocol.reward_stats import RewardFailure, RewardStats
from dar.protocol.samples import Sample, SampleFlag
from dar.protocol.spec import JobSpec
from dar.protocol.status import JobStatus
from dar.protocol.stream import StreamFrame, StreamType

PATH = "/fine_tuning/jobs"
Order = Literal["asc", "desc"]
SampleOrder = Literal["asc", "desc", "reward", "-reward", "advantage", "-advantage", "group"]


class Jobs:
    """Training jobs: ``client.jobs``."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self,
        /,
        spec: JobSpec | Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
        **fields: object,
    ) -> Job:
        """Submit a job.

            job = client.jobs.create(
                model="my-model",
                training_file=file.id,
                method={"type": "dar", "dar": {"rewards": {"components": [
                    {"name": "short", "url": "http://127.0.0.1:9000/score"}]}}},
            )

        Args:
            spec: The whole spec. Fields given by name replace its fields.
            idempotency_key: A repeated key returns the same job. Default: a new key, which all
                retries of this call use.
            **fields: Fields of the spec.

        Raises:
            InvalidRequestError: The spec is invalid; ``param`` and ``problems`` say where.
            IdempotencyMismatchError: The key was used with another spec.
        """
        headers = {"idempotency-key": idempotency_key or f"dar-{ULID()}"}
        return self._transport.post(PATH, Job, body=_body(spec, fields), headers=headers)

    def validate(
        self, /, spec: JobSpec | Mapping[str, Any] | None = None, **fields: object
    ) -> JobValidation:
        """Check a job without submitting it, with a short probe of its reward services.

            report = client.jobs.validate(spec)
            assert report.allowed_to_proceed, report.problems

        Args:
            spec: The whole spec. Fields given by name replace its fields.
            **fields: Fields of the spec.

        Returns:
            All problems at once, the resolved spec, and what the job would take.

        Raises:
            InvalidRequestError: It is no spec at all: a field is unknown or has a wrong type.
        """
        return self._transport.post(f"{PATH}/validate", JobValidation, body=_body(spec, fields))

    def retrieve(self, job_id: str | HasId) -> Job:
        """The current state of a job."""
        return self._transport.get(_path(job_id), Job)

    def list(
        self,
        *,
        status: JobStatus | None = None,
        model: str | None = None,
        metadata: Mapping[str, str] | None = None,
        label: str | None = None,
        created_after: int | None = None,
        created_before: int | None = None,
        q: str | None = None,
        order: Order = "desc",
        limit: int = 20,
    ) -> Listing[Job]:
        """All jobs that match every filter, newest first.

        Args:
            status: Only jobs with this status.
            model: Only jobs that train this model.
            metadata: Only jobs with these labels.
            label: ``key=value``, or ``key`` for jobs that have this label, whatever its value.
            created_after: Only jobs of this second and later, in seconds since 1970.
            created_before: Only jobs before this second.
            q: Part of the id, of the name of the model or of the result, or of a label's value.
            order: ``asc``: oldest first.
            limit: Size of a page.
        """
        labels = {
            f"metadata[{key}]": value for key, value in mapping("metadata", metadata or {}).items()
        }
        params = {
            "status": status,
            "model": model,
            "label": label,
            "created_after": created_after,
            "created_before": created_before,
            "q": q,
            "order": order,
            "limit": limit,
            **labels,
        }
        return Listing(self._transport, PATH, Page[Job], params)

    def config(self, job_id: str | HasId) -> JobConfig:
        """What a job is made of: its resolved spec, and hashes of code, data and model."""
        return self._transport.get(f"{_path(job_id)}/config", JobConfig)

    def fork(
        self,
        job_id: str | HasId,
        *,
        checkpoint: str = "latest",
        changes: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Submit a job that starts from a checkpoint of another one, with changed settings.

            slower = {"method": {"dar": {"hyperparameters": {"learning_rate": 1e-6}}}}
            job = client.jobs.fork(job.id, checkpoint="best", changes=slower)

        It begins at step 0 with these weights, a new optimizer, and the checkpoint as reference.

        Args:
            job_id: The job, in any status.
            checkpoint: Id of one of its checkpoints, ``latest``, ``best``, or ``start``: the model
                that it has started from itself.
            changes: What differs from its spec, in the same form; None as a value resets a field.
            idempotency_key: As for `create`.

        Raises:
            ConflictError: The job has no such checkpoint yet.
            InvalidRequestError: The changed spec cannot be used.
        """
        body = {"checkpoint": checkpoint, "changes": mapping("changes", changes or {})}
        headers = {"idempotency-key": idempotency_key or f"dar-{ULID()}"}
        return self._transport.post(f"{_path(job_id)}/fork", Job, body=body, headers=headers)

    def rerun(self, job_id: str | HasId, *, idempotency_key: str | None = None) -> Job:
        """Submit an ended job once more, with the same spec, seed and model, as a new job.

        Args:
            job_id: The job; it stays as it is, with its attempts.
            idempotency_key: As for `create`.

        Raises:
            ConflictError: The job has not ended.
        """
        headers = {"idempotency-key": idempotency_key or f"dar-{ULID()}"}
        return self._transport.post(f"{_path(job_id)}/rerun", Job, headers=headers)

    def update(
        self,
        job_id: str | HasId,
        *,
        metadata: Mapping[str, str] | None = None,
        limits: Mapping[str, Any] | None = None,
        if_match: str | None = None,
    ) -> Job:
        """Change the labels of a job, or the limits of one that has not ended.

        Args:
            job_id: The job.
            metadata: All labels; they replace those that it has. None: they stay.
            limits: Limits to set, like ``{"max_seconds": 3600}``; those left out stay.
            if_match: ``etag`` of the job as you know it: the job is changed only if nobody else
                has changed its labels or limits since then.

        Raises:
            PreconditionFailedError: The job has another ``etag``.
            ConflictError: Limits of a job that has ended.
        """
        given = {"metadata": metadata, "limits": limits}
        body = {name: mapping(name, one) for name, one in given.items() if one is not None}
        headers = None if if_match is None else {"if-match": if_match}
        return self._transport.patch(_path(job_id), Job, body=body, headers=headers)

    def cancel(self, job_id: str | HasId) -> Job:
        """Cancel a job; its checkpoints are kept. Cancelling it again is no error.

        Raises:
            ConflictError: The job has succeeded or failed.
        """
        return self._transport.post(f"{_path(job_id)}/cancel", Job)

    def pause(self, job_id: str | HasId) -> Job:
        """Pause a job.

        A queued job pauses at once. A running job is ``pausing`` until it has written a checkpoint.

        Raises:
            ConflictError: The job has ended or is being cancelled.
        """
        return self._transport.post(f"{_path(job_id)}/pause", Job)

    def start(self, job_id: str | HasId) -> Job:
        """Queue a job that was submitted with ``auto_start=False``. Starting it again is no error.

        Raises:
            ConflictError: The job has ended, or is paused after it has run: resume it.
        """
        return self._transport.post(f"{_path(job_id)}/start", Job)

    def stop(self, job_id: str | HasId) -> Job:
        """End a job successfully with the model that it has so far.

        A running job finishes its step and writes a checkpoint first (``status_detail``
        ``stopping``). A queued or paused job ends at once with its newest checkpoint.

        Raises:
            ConflictError: The job has ended, is being cancelled, or waits and has no checkpoint.
        """
        return self._transport.post(f"{_path(job_id)}/stop", Job)

    def resume(self, job_id: str | HasId) -> Job:
        """Queue a paused, failed or cancelled job again; it continues from its newest checkpoint.

        Raises:
            ConflictError: The job has succeeded, is being cancelled, or needs a deleted file.
        """
        return self._transport.post(f"{_path(job_id)}/resume", Job)

    def delete(self, job_id: str) -> Deleted:
        """Delete a job that has ended, with its checkpoints, model, events, metrics and samples.

        Raises:
            ConflictError: The job has not ended, or another job starts from its checkpoints.
        """
        return self._transport.delete(_path(job_id), Deleted)

    def wait(
        self,
        job_id: str | HasId,
        *,
        on_progress: Callable[[Job], None] | None = None,
        on_pause: OnPause = "return",
        poll_seconds: float = 1.0,
        timeout_seconds: float | None = None,
    ) -> Job:
        """Wait until a job ends, through restarts of the service.

            job = client.jobs.wait(job.id, on_progress=lambda job: print(job.progress.step))
            assert job.status == "succeeded", job.error

        While the job waits for something, its ``status_detail`` and ``status_message`` are logged
        as warnings of the logger ``dar.client.jobs``, which Python shows on stderr by default.

        Args:
            job_id: The job.
            on_progress: Called with the job at the start and after each change.
            on_pause: What to do when the job is paused and does not resume by itself: a user paused
                it, or rewards are missing that no reward service computes. ``return`` returns the
                paused job, ``raise`` raises an error, ``wait`` waits until somebody resumes the
                job. A pause for a reward service is always waited for, also where the training
                service cannot connect to it and somebody has to resume the job.
            poll_seconds: Pause between two requests.
            timeout_seconds: Longest wait; default: no limit.

        Returns:
            The job, ``succeeded``, ``failed`` or ``cancelled``; also ``paused``, see ``on_pause``.

        Raises:
            ConflictError: The job is paused, only you can end the pause, and ``on_pause`` is
                ``raise``.
            TimeoutError: The job has not ended in time; it continues.
            DARError: For 300 s the service could not be reached, or failed in a way that may pass.
            ConfigurationError: An argument is out of range.
        """
        last: Job | None = None
        for last in self.watch(
            job_id, on_pause=on_pause, poll_seconds=poll_seconds, timeout_seconds=timeout_seconds
        ):
            if on_progress is not None:
                on_progress(last)
        return ended(last)

    def watch(
        self,
        job_id: str | HasId,
        *,
        on_pause: OnPause = "return",
        poll_seconds: float = 1.0,
        timeout_seconds: float | None = None,
    ) -> Following[Job]:
        """A job now and after each change, until it ends; arguments and errors as of `wait`.

        for job in client.jobs.watch(job.id):
            print(job.status, job.progress.step)
        """
        watch = Watch(id_of(job_id), on_pause, poll_seconds, timeout_seconds)
        return Following(lambda: watch.steps(lambda: self._fetched(job_id)))

    def _fetched(self, job_id: str | HasId) -> Callable[[], Job]:
        """Asks for a job; what is returned parses the answer."""
        answer = self._transport.send("GET", _path(job_id))
        return lambda: self._transport.parse(answer, Job)

    def events(
        self,
        job_id: str | HasId,
        *,
        order: Order = "desc",
        limit: int = 20,
        rewound: bool = False,
    ) -> Listing[Event]:
        """The events of a job, newest first.

        Args:
            job_id: The job.
            order: ``asc``: oldest first.
            limit: Size of a page.
            rewound: Whether to list events of steps after the checkpoint from which a later attempt
                started, too.
        """
        params = {"order": order, "limit": limit, "rewound": rewound or None}
        return Listing(self._transport, f"{_path(job_id)}/events", Page[Event], params)

    def stream(
        self,
        job_id: str | HasId,
        *,
        types: Sequence[StreamType] | StreamType | None = None,
        from_seq: int = 1,
    ) -> Iterator[StreamFrame]:
        """All that happens to a job, from any point of its history until it ends.

            for frame in client.jobs.stream(job.id, types=["status", "metrics"]):
                if frame.event is not None:
                    print(frame.seq, frame.event.message)

        A broken connection is opened again, and each frame comes once. The last frame has the type
        ``done`` and the job at its end. To continue later, pass ``from_seq=frame.seq + 1``.

        Args:
            job_id: The job.
            types: Only such frames; ``gap`` and ``done`` come in any case. Default: all.
            from_seq: Number of the first event; 1: the beginning.

        Raises:
            NotFoundError: There is no such job.
            DARError: For 300 s the service could not be reached, or failed in a way that may pass.
            ConfigurationError: ``from_seq`` is out of range.
        """
        if type(from_seq) is not int or from_seq < 1:
            raise ConfigurationError(
                f"from_seq is {from_seq!r}, but it must be a whole number from 1", param="from_seq"
            )
        params = {"types": None if types is None else ",".join(texts("types", types))}
        return follow(self._transport, f"{_path(job_id)}/stream", params, from_seq)

    def poll_events(
        self,
        job_id: str | HasId,
        *,
        after_seq: int = 0,
        wait_seconds: int = 20,
        types: Sequence[StreamType] | StreamType | None = None,
        limit: int = 100,
    ) -> Sequence[Event]:
        """The next events of a job, oldest first: the stream for those who rather ask again.

            events = client.jobs.poll_events(job.id, after_seq=events[-1].seq)

        Args:
            job_id: The job.
            after_seq: Number of the last event that you have; 0: none.
            wait_seconds: How long to wait for an event, if there is none yet and the job has not
                ended.
            types: Only such events. Default: all.
            limit: Most events of a response.
        """
        params = {
            "order": "asc",
            "after_seq": after_seq,
            "wait": wait_seconds,
            "types": None if types is None else ",".join(texts("types", types)),
            "limit": limit,
        }
        return self._transport.get(f"{_path(job_id)}/events", Page[Event], params).data

    def attempts(
        self, job_id: str | HasId, *, order: Order = "desc", limit: int = 20
    ) -> Listing[Attempt]:
        """The attempts of a job, newest first: where each ran, and whose fault a failure was."""
        params = {"order": order, "limit": limit}
        return Listing(self._transport, f"{_path(job_id)}/attempts", Page[Attempt], params)

    def log(
        self,
        job_id: str | HasId,
        *,
        attempt: int | None = None,
        tail: int | None = None,
        level: LogLevel | None = None,
        after: int | None = None,
    ) -> JobLog:
        """The end of the log of a job's trainer, while it runs and afterwards.

            print(client.jobs.log(job.id, tail=50).text)

        Args:
            job_id: The job.
            attempt: Number of the attempt; default: the newest that has a log.
            tail: Only so many lines of its end; default: all that is stored, at most 64 KiB.
            level: Only lines of this level and above, and lines without a level.
            after: ``bytes`` of an earlier response: only what is newer. Pass its ``attempt`` too.

        Raises:
            NotFoundError: There is no such log.
        """
        params = {"attempt": attempt, "tail": tail, "level": level, "after": after}
        return self._transport.get(f"{_path(job_id)}/logs", JobLog, params)

    def follow_log(
        self,
        job_id: str | HasId,
        *,
        attempt: int | None = None,
        level: LogLevel | None = None,
        poll_seconds: float = 1.0,
    ) -> Following[JobLog]:
        """The log of a job's trainer as it grows, in parts, until the job ends.

            for part in client.jobs.follow_log(job.id):
                print(part.text, end="")

        Args:
            job_id: The job.
            attempt: Only the log of this attempt; default: from the newest on, one after another.
            level: Only lines of this level and above, and lines without a level.
            poll_seconds: Pause between two requests.
        """
        check_seconds("poll_seconds", poll_seconds)

        def read(number: int | None, after: int | None) -> JobLog:
            return self.log(job_id, attempt=number, level=level, after=after)

        return Following(
            lambda: log_steps(lambda: self._fetched(job_id), read, attempt, poll_seconds)
        )

    def metrics(
        self,
        job_id: str | HasId,
        *,
        names: str | Sequence[str] | None = None,
        after: str | None = None,
        from_step: int | None = None,
        to_step: int | None = None,
        max_points: int | None = None,
        rewound: bool = False,
    ) -> Metrics:
        """The series of a job, each with its own steps.

            metrics = client.jobs.metrics(job.id, names=["dar/rewards_mean"])
            newer = client.jobs.metrics(job.id, names=["dar/rewards_mean"], after=metrics.cursor)
            chart = client.jobs.metrics(job.id, max_points=1000)

        Args:
            job_id: The job.
            names: Names of series, or a single one; default: all.
            after: ``cursor`` of an earlier response; only newer values are returned. If the
                response has ``rewound_to``, drop the later steps of earlier responses first.
            from_step: First step to return.
            to_step: Last step to return.
            max_points: Most points of a series. Of a longer one, each bucket of ``resolution``
                steps keeps its least and its greatest value; default: all points.
            rewound: Whether to return what earlier attempts reported of steps after the checkpoint
                from which a later attempt started, too, as ``rewound``.
        """
        params = _points(names, from_step, to_step, max_points)
        params |= {"after": after, "rewound": rewound or None}
        return self._transport.get(f"{_path(job_id)}/metrics", Metrics, params)

    def export_metrics(
        self,
        job_id: str | HasId,
        *,
        format: Literal["csv", "jsonl"] = "csv",
        names: str | Sequence[str] | None = None,
        from_step: int | None = None,
        to_step: int | None = None,
        max_points: int | None = None,
    ) -> str:
        """The series of a job as text, a line for each point: name, step, value, at.

            Path("metrics.csv").write_text(client.jobs.export_metrics(job.id))

        Args:
            job_id: The job.
            format: ``csv``, with a line of column names first, or ``jsonl``.
            names: Names of series, or a single one; default: all.
            from_step: First step to return.
            to_step: Last step to return.
            max_points: Most points of a series, as in `metrics`.
        """
        params = _points(names, from_step, to_step, max_points) | {"format": format}
        return self._transport.send("GET", f"{_path(job_id)}/metrics", params=params).text

    def metric_names(self, job_id: str | HasId) -> Sequence[ReportedMetric]:
        """The metrics that a job has reported, with unit, meaning and extremes so far."""
        path = f"{_path(job_id)}/metrics/names"
        return self._transport.get(path, Page[ReportedMetric]).data

    def compare_metrics(
        self,
        job_ids: Sequence[str | HasId],
        *,
        names: str | Sequence[str] | None = None,
        from_step: int | None = None,
        to_step: int | None = None,
        max_points: int | None = None,
    ) -> Sequence[JobMetrics]:
        """The series of several jobs, in one request.

            for one in client.jobs.compare_metrics([first, second], names="dar/rewards_mean"):
                print(one.job_id, one.series["dar/rewards_mean"].value[-1])

        Args:
            job_ids: At most 20 jobs; the result is in their order.
            names: Names of series, or a single one; default: all.
            from_step: First step to return.
            to_step: Last step to return.
            max_points: Most points of a series, as in `metrics`.
        """
        params = _points(names, from_step, to_step, max_points)
        given = [job_ids] if isinstance(job_ids, str) else job_ids
        params["ids"] = ",".join(id_of(one) for one in given)
        return self._transport.get("/fine_tuning/metrics", Page[JobMetrics], params).data

    def stream_metrics(
        self,
        job_id: str | HasId,
        *,
        names: str | Sequence[str] | None = None,
        after: str | None = None,
        poll_seconds: float | None = None,
    ) -> Following[Metrics]:
        """What is new of a job's series, again and again, until the job ends.

            for new in client.jobs.stream_metrics(job.id, names=["dar/rewards_mean"]):
                print(new.series)

        Args:
            job_id: The job.
            names: Names of series, or a single one; default: all.
            after: ``cursor`` of an earlier response; default: from the beginning. If a response has
                ``rewound_to``, drop the later steps of earlier ones first.
            poll_seconds: Pause between two requests; default: what the service recommends.
        """
        if poll_seconds is not None:
            check_seconds("poll_seconds", poll_seconds)

        def read(cursor: str | None) -> Metrics:
            return self.metrics(job_id, names=names, after=cursor)

        return Following(lambda: metric_steps(read, after, poll_seconds))

    def reward_stats(self, job_id: str | HasId) -> RewardStats:
        """Counts of scored, skipped and failed samples, and statistics of each reward service."""
        return self._transport.get(f"{_path(job_id)}/reward_stats", RewardStats)

    def reward_failures(
        self,
        job_id: str | HasId,
        *,
        step: int | None = None,
        order: Order = "desc",
        limit: int = 20,
        rewound: bool = True,
    ) -> Listing[RewardFailure]:
        """Failed requests to reward services, after all retries, newest first.

        Args:
            job_id: The job.
            step: Only those of this step.
            order: ``asc``: oldest first.
            limit: Size of a page.
            rewound: Whether to list those of steps after the checkpoint from which a later attempt
                started, too. They show why the attempt before it has ended.
        """
        params = {"step": step, "order": order, "limit": limit}
        params["rewound"] = None if rewound else False
        path = f"{_path(job_id)}/reward_failures"
        return Listing(self._transport, path, Page[RewardFailure], params)

    def samples(
        self,
        job_id: str | HasId,
        *,
        step: int | None = None,
        group: int | None = None,
        prompt_id: str | None = None,
        flag: SampleFlag | None = None,
        min_reward: float | None = None,
        max_reward: float | None = None,
        order: SampleOrder = "desc",
        limit: int = 20,
        rewound: bool = False,
    ) -> Listing[Sample]:
        """Completions that were stored for viewing, with their reward, advantage and weight.

        Args:
            job_id: The job.
            step: Only those of this step.
            group: Only those of the prompt with this number in its step, from 0.
            prompt_id: Only those of this prompt, in all steps.
            flag: Only those that were ``truncated``, have a reward that failed (``error``) or was
                ``skipped``, or are ``unscored`` for any reason.
            min_reward: Lowest reward.
            max_reward: Highest reward.
            order: By age or by value; ``-reward``: highest reward first; ``group``: by step, newest
                first, with the completions of each prompt together.
            limit: Size of a page.
            rewound: Whether to list those of steps after the checkpoint from which a later attempt
                started, too.
        """
        params = {
            "step": step,
            "group": group,
            "prompt_id": prompt_id,
            "flag": flag,
            "min_reward": min_reward,
            "max_reward": max_reward,
            "order": order,
            "limit": limit,
            "rewound": rewound or None,
        }
        return Listing(self._transport, f"{_path(job_id)}/samples", Page[Sample], params)

    def sample(self, job_id: str | HasId, sample_id: str | HasId) -> Sample:
        """One sample, also of a step that was rewound.

        Raises:
            NotFoundError: There is no such sample, or it was deleted by age or size.
        """
        return self._transport.get(f"{_path(job_id)}/samples/{in_path(sample_id)}", Sample)


def _body(spec: JobSpec | Mapping[str, Any] | None, fields: Mapping[str, object]) -> dict[str, Any]:
    given = (
        spec.model_dump(mode="json", exclude_unset=True)
        if isinstance(spec, JobSpec)
        else mapping("spec", spec or {})
    )
    return {**given, **fields}


def _points(
    names: str | Sequence[str] | None,
    from_step: int | None,
    to_step: int | None,
    max_points: int | None,
) -> dict[str, Any]:
    """Parameters that choose points of series."""
    return {
        "names": None if names is None else ",".join(texts("names", names)),
        "from_step": from_step,
        "to_step": to_step,
        "max_points": max_points,
    }


def _path(job_id: str | HasId) -> str:
    return f"{PATH}/{in_path(job_id)}"
