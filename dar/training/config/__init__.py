"""The arguments of `dar.DARTrainer`.

config: `DARConfig`.
fields: dataclass fields with default, help and unit of the job spec.
learning_rates: the learning rate of a run that gives none, by model size.
ranges: bounds of all options.
ignored: options of transformers that have no effect here, and are rejected.
"""
