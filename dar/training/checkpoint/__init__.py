"""Checkpoints of a run, and what is uploaded to the hub.

checkpoint: the files of a checkpoint, published by one rename and verified when loaded.
disk_errors: what a disk that takes no more means for a run.
background: a thread that finishes a checkpoint while training goes on.
resume: saves the checkpoints of a run, removes old ones, and restores the run from one.
fingerprint: digest of everything that decides the result; a resume with another one is rejected.
hub: uploads models and checkpoints to the hub.
model_card: Markdown that describes trained weights.
"""
