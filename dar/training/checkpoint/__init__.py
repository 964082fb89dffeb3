"""Checkpoints of a run, and what is uploaded to the hub.

checkpoint: the files of a checkpoint, published by one rename and verified when loaded.
resume: publishes the checkpoints of a run, and loads the one that it resumes from.
fingerprint: digest of everything that decides the result of a run.
hub: uploads models and checkpoints to the hub.
model_card: Markdown that describes trained weights.
"""
