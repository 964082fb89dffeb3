"""What signing, encoding and validating one request with 16 samples costs."""

import statistics
import time
from datetime import UTC, datetime

import orjson
from stack import report

from dar.rewards.base import RequestBatch, RewardContext, RewardSample, Scored
from dar.rewards.http.signing import decode_secret, signed_headers
from dar.rewards.http.wire import encode_sample, request_id_of
from dar.rewards.protocols.native import NativeProtocol

RUNS = 9
REPEATS = 400
SAMPLES = 16
SAMPLE_CHARS = 1024
SECRET = "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def samples() -> tuple[RewardSample, ...]:
    """Four groups of four."""
    return tuple(
        RewardSample(
            id=f"s{n}",
            group_id=f"g{n // 4}",
            index=n % 4,
            prompt="The soup was",
            messages=None,
            completion="x" * SAMPLE_CHARS,
            finish_reason="stop",
            completion_tokens=200,
            columns={"ground_truth": "42"},
        )
        for n in range(SAMPLES)
    )


def once(given: tuple[RewardSample, ...], key: bytes, answer: bytes, request_id: str) -> None:
    """All that is done to one request and its answer, but the sending."""
    context = RewardContext(step=1, job_id="ftjob-bench")
    now = datetime.now(UTC)
    protocol = NativeProtocol()
    encoded = [encode_sample(sample, None, 0) for sample in given]
    known_id = request_id_of(encoded, "bench", context, number=0)
    assert known_id == request_id
    sent = tuple(sample.json for sample in encoded)
    batch = RequestBatch(known_id, "bench", context, given, None, now, now, sent)
    body = protocol.encode(batch)
    signed_headers([key], known_id, int(now.timestamp()), body)
    assert protocol.decode(answer, batch)[0] == Scored(0.5, {"fit": 1.0}, "fine")


def main() -> None:
    """Measure and report."""
    given, key = samples(), decode_secret(SECRET)
    context = RewardContext(step=1, job_id="ftjob-bench")
    encoded = [encode_sample(sample, None, 0) for sample in given]
    request_id = request_id_of(encoded, "bench", context, number=0)
    results = [
        {"id": sample.id, "reward": 0.5, "components": {"fit": 1.0}, "feedback": "fine"}
        for sample in given
    ]
    answer = orjson.dumps({"request_id": request_id, "results": results})
    means = []
    for _ in range(RUNS):
        started = time.perf_counter()
        for _ in range(REPEATS):
            once(given, key, answer, request_id)
        means.append((time.perf_counter() - started) / REPEATS)
    report(
        "reward_encoding",
        milliseconds_per_request=round(statistics.median(means) * 1e3, 3),
        samples=SAMPLES,
        runs=RUNS,
    )


if __name__ == "__main__":
    main()
