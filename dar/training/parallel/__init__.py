"""Several processes in one training run.

launch: how the processes are started.
ranks: communication between them beside torch's collectives.
sharding: weights and optimizer state in shards, gathered to be read.
deepspeed: the same under DeepSpeed.
deepspeed_config: DeepSpeed's configuration.
"""
