"""What a scripted trainer computes: a chain of states, one for each step."""

import hashlib

REPEATS = 40_000
"""Makes the weights large enough for an upload in parts."""


def next_state(state: bytes) -> bytes:
    """The state one step later."""
    return hashlib.sha256(state).digest()


def state_after(seed: int, steps: int) -> bytes:
    """The state after ``steps`` steps that nothing disturbed."""
    state = hashlib.sha256(f"seed {seed}".encode()).digest()
    for _ in range(steps):
        state = next_state(state)
    return state


def weights(state: bytes) -> bytes:
    """The weights that a checkpoint has in this state."""
    return state * REPEATS
