"""Step 9 of a probe: a result that is promised with a 202 must come, and count once."""

from dar.rewards.probe.callbacks import ProbeInbox
from dar.rewards.probe.steps import ProbeSession


async def check_later(session: ProbeSession, inbox: ProbeInbox | None) -> None:
    """Ask once, and look at how the result came."""
    notes = session.notes
    if session.component.reply != "either":
        notes.skip("the component takes answers at once alone (reply: sync)")
        return
    asked = await session.line.ask(session.samples[:1])
    if asked.failure is not None:
        notes.failed(asked)
        return
    if not asked.is_later:
        notes.done("it answered at once, as it may")
        return
    request_id = asked.wire.sent["webhook-id"]
    if inbox is None or not inbox.has_received(request_id):
        notes.done(f"its result was fetched from poll_url after {asked.seconds:.2f} s")
        return
    fate = inbox.repeat(request_id)
    if fate != "duplicate":
        notes.error("async.not_consumed", f"the same callback, once more, was answered {fate}")
    notes.done(
        f"its callback came after {asked.seconds:.2f} s; the same one once more is a duplicate"
    )
