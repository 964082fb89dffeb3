"""Data sets.

rows: checks of rows, their token ids, cuts to the maximum length, batches.
codec: texts and tokens of completions, exactly as they follow a prompt.
chat: conversations as a model reads them, by its chat template.
sets: data sets by name: files, folders, hub.
hub: data sets of a hub, loaded without running their code.
load_errors: what errors of loaders mean: the hub, the machine, or the files are at fault.
"""

from dar.training.data.rows import DataCollatorForDAR, PromptEncoder

__all__ = ["DataCollatorForDAR", "PromptEncoder"]
