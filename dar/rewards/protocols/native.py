"""``dar.reward.v1``: this project's own protocol, with sample ids in both directions."""

import orjson

from dar.protocol.rewards import MAX_SAMPLES, REQUEST_TYPE, VERSION, decode_response
from dar.rewards.base import RequestBatch, RewardResult
from dar.rewards.http.responses import as_result
from dar.rewards.http.wire import encode_sample


class NativeProtocol:
    """Sends samples with ids and reads results with the same ids."""

    name = VERSION
    max_samples: int | None = MAX_SAMPLES

    def encode(self, batch: RequestBatch) -> bytes:
        context = batch.context
        samples = batch.encoded or [
            encode_sample(sample, batch.columns, context.steps_done).json
            for sample in batch.samples
        ]
        content = {
            "type": REQUEST_TYPE,
            "version": VERSION,
            "request_id": batch.request_id,
            "job_id": context.job_id,
            "component": batch.component,
            "step": context.step,
            "mode": context.mode,
            "created_at": batch.created_at,
            "samples": list(map(orjson.Fragment, samples)),
            "reply": {"modes": ["sync"], **(batch.reply or {}), "deadline": batch.deadline},
        }
        return orjson.dumps(content, option=orjson.OPT_UTC_Z)

    def decode(self, body: bytes, batch: RequestBatch) -> list[RewardResult]:
        ids = [sample.id for sample in batch.samples]
        results = decode_response(body, request_id=batch.request_id, ids=ids)
        return [as_result(result) for result in results]
