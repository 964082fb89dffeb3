"""What a worker reports of reward requests whose results may come later."""

from typing import Annotated

from fastapi import APIRouter, Depends

from dar.protocol.worker import (
    AnnounceRewardRequests,
    NoteRewardProgress,
    RewardProgressNoted,
    RewardRequestState,
    RewardRequestStates,
)
from service.http import errors
from service.http.auth import LeaseHolder
from service.http.bodies import body_of, schema_of
from service.runtime import CurrentRuntime
from service.store import fence, reward_requests
from service.store.database import Transaction
from service.store.tables import RewardRequestRow

router = APIRouter(prefix="/v1/worker/leases", tags=["worker"])
AnnounceBody = Annotated[
    AnnounceRewardRequests, Depends(body_of(AnnounceRewardRequests, is_of_worker=True))
]
ProgressBody = Annotated[
    NoteRewardProgress, Depends(body_of(NoteRewardProgress, is_of_worker=True))
]


@router.post(
    "/{lease_id}/reward_requests",
    openapi_extra=schema_of(AnnounceRewardRequests),
    responses=errors.may_answer(409),
)
def announce_reward_requests(
    lease_id: LeaseHolder, runtime: CurrentRuntime, body: AnnounceBody
) -> RewardRequestStates:
    """Store requests before they are sent; a known one is returned with its result, if any."""

    def work(
        transaction: Transaction,
    ) -> list[tuple[RewardRequestRow, float | None, str | None]]:
        held = fence.hold(transaction, lease_id, body.attempt)
        rewards = held.job.parsed_spec.dar.rewards
        signed = {
            component.name
            for component in ([] if rewards is None else rewards.components)
            if component.require_signed_responses
        }
        rows = [
            reward_requests.announce(
                transaction, box, held, wanted, is_signature_required=wanted.component in signed
            )
            for wanted in body.requests
        ]
        return [
            (
                row,
                reward_requests.seconds_left(transaction, row, wanted),
                reward_requests.poll_url_of(row, box, held),
            )
            for row, wanted in zip(rows, body.requests, strict=True)
        ]

    box = runtime.secrets
    stored = runtime.database.transact(work)
    base = runtime.settings.callback_url
    return RewardRequestStates(
        requests=[
            RewardRequestState(
                request_id=row.id,
                callback_url=f"{base}/{row.id}",
                deadline=row.deadline.timestamp(),
                seconds=seconds,
                is_accepted=row.is_accepted,
                poll_url=poll_url,
                result=row.result,
                problem=row.last_error,
            )
            for row, seconds, poll_url in stored
        ]
    )


@router.post(
    "/{lease_id}/reward_requests/progress",
    openapi_extra=schema_of(NoteRewardProgress),
    responses=errors.may_answer(409),
)
def note_reward_progress(
    lease_id: LeaseHolder, runtime: CurrentRuntime, body: ProgressBody
) -> RewardProgressNoted:
    """Report which requests a service accepted with a 202, and which got a result by polling.

    Unknown requests are returned, and the others are stored.
    """

    def work(transaction: Transaction) -> list[str]:
        held = fence.hold(transaction, lease_id, body.attempt)
        return reward_requests.note_progress(transaction, runtime.secrets, held, body.requests)

    return RewardProgressNoted(unknown=runtime.database.transact(work))
