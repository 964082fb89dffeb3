"""The public names of `dar.training.step.offline`."""

from dar.training.step.offline import ReplaySource, RowEncoder

__all__ = ["ReplaySource", "RowEncoder"]
