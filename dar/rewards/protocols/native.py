"""``dar.reward.v1``: this project's own protocol, with ids on both sides."""

from dar.protocol.rewards import MAX_SAMPLES, VERSION, decode_response
from dar.rewards.base import RequestBatch, RewardResult
from dar.rewards.http.wire import as_result, encode_request, encode_sample


class NativeProtocol:
    """Samples with ids go out, results with the same ids come back."""

    name = VERSION
    max_samples: int | None = MAX_SAMPLES

    def encode(self, batch: RequestBatch) -> bytes:
        """The body of a request; see `RewardProtocol`."""
        steps_done = batch.context.steps_done
        samples = [encode_sample(sample, batch.columns, steps_done) for sample in batch.samples]
        return encode_request(
            samples,
            batch.component,
            batch.context,
            created_at=batch.created_at,
            deadline=batch.deadline,
            request_id=batch.request_id,
            reply=batch.reply,
        ).body

    def decode(self, body: bytes, batch: RequestBatch) -> list[RewardResult]:
        """The results in an answer; see `RewardProtocol`."""
        ids = [sample.id for sample in batch.samples]
        results = decode_response(body, request_id=batch.request_id, ids=ids)
        return [as_result(result) for result in results]
