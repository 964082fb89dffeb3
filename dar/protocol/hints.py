"""The thresholds of all hints: warnings about what works, but is perhaps not what its owner wants.

A job and ``dar train`` warn while they train, and a probe warns of a reward service. `HINTS` is the
only place where a threshold has its value. docs/reference.md lists them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HintThresholds:
    """One threshold per field; the first word of a name is the kind of hint."""

    # --- whether the settings fit the rewards ----------------------------------------------------

    advantages_steps: int = 5
    """Steps at the start of a run after which the size of its advantages is judged."""
    advantages_least: float = 0.05
    """Standard deviation of A / (alpha + beta) below which advantages are too small to matter."""
    advantages_fitting: float = 1.0
    """Standard deviation of A / (alpha + beta) that fits: a hint names the alpha + beta that gives
    it."""
    clip_steps: int = 5
    """Steps over which the weights at the clip are counted."""
    clip_most: float = 0.3
    """Share of weights at the clip above which weights no longer follow the rewards."""

    kl_run: float = 1 / 3
    """Share of a run's steps after which its KL is compared with ``kl_budget``."""
    kl_least: float = 0.1
    """Multiple of ``kl_budget`` below which the KL is too small."""
    kl_most: float = 2.0
    """Multiple of ``kl_budget`` above which the KL is too large."""

    # --- steps from whose rewards nothing can be learned -----------------------------------------

    degenerate_steps: int = 3
    """Steps in a row, all with constant rewards, or all with only truncated or only skipped
    completions, before a warning."""
    degenerate_prompts: int = 8
    """Least number of prompts in such steps; a rare reward is often absent from one or two
    prompts."""

    # --- rewards that jump -----------------------------------------------------------------------

    drift_recent_steps: int = 4
    """Steps whose mean is compared with the steps before."""
    drift_window_steps: int = 32
    """Most steps before, with which they are compared."""
    drift_warm_up_steps: int = 16
    """Least number of steps before."""
    drift_jump: float = 6.0
    """Distance of the two means above which rewards have jumped, in sigma."""
    drift_calm: float = 3.0
    """Distance below which a jump is over, in sigma."""
    drift_rounding: float = 1e-9
    """Share of the rewards' size, which counts as at least 1, below which a difference is
    rounding."""

    # --- reward services that are too slow -------------------------------------------------------

    capacity_margin: float = 1.5
    """Factor on the concurrency that would be enough, for stragglers."""
    capacity_counted: float = 0.8
    """Share of a step's groups whose rate is measured. The last ones are stragglers, which say
    little about capacity."""
    capacity_least_wait: float = 0.05
    """Share of a step that must be spent waiting before a warning."""
    capacity_least_groups: int = 4
    """Least number of groups from which a rate is computed."""
    capacity_repeated: float = 1.25
    """Factor by which the concurrency that is needed must grow before the warning is repeated."""

    # --- what a probe finds ----------------------------------------------------------------------

    probe_equal: float = 1e-6
    """Rewards that differ by no more are equal."""
    probe_noise: float = 0.2
    """Share of the rewards' spread above which noise is reported."""
    probe_queueing: float = 2.0
    """Factor of latency under load above which additional requests only queue."""
    probe_noticed_seconds: float = 0.25
    """Latency below which queueing inside the service is not reported."""
    probe_failed: float = 0.5
    """Share of failed requests above which retries do not help."""
    probe_certificate_days: int = 14
    """Days that a certificate should still be valid."""


HINTS = HintThresholds()
"""The thresholds in force."""
