"""Rows, data sets and data of a hub."""

from dar.training.data.rows import DataCollatorForDAR, PromptEncoder

__all__ = ["DataCollatorForDAR", "PromptEncoder"]
