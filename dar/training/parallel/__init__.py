"""Several processes in one training run.

launch: how the processes are started, and the strategy that a job spec names.
ranks: communication between them beside torch's collectives; a failed process ends all.
sharding: weights and optimizer state in shards, gathered to sample and to save.
deepspeed: the same under DeepSpeed.
deepspeed_config: DeepSpeed's configuration.
"""
