"""Data sets.

rows: checks of rows, `PromptEncoder` and `DataCollatorForDAR`.
sets: data sets by name: files, folders, hub.
hub: data sets of a hub.
"""

from dar.training.data.rows import DataCollatorForDAR, PromptEncoder

__all__ = ["DataCollatorForDAR", "PromptEncoder"]
