"""The arguments of `dar.DARTrainer`.

config: `DARConfig`.
fields: dataclass fields with default, help and unit of the job spec.
ranges: bounds of all options.
ignored: options of transformers that have no effect here, and are rejected.
"""
