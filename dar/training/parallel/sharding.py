"""Weights in shards, one for each process (FSDP2, ZeRO-3): gathered to sample and to be saved.

A forward pass of a sharded model contains collectives, so all processes must make the same number
of passes. Sampling cannot: completions differ in length. So code that only reads the weights first
gathers them on every process, and then needs no other process. Training passes stay sharded; the
trainer makes the same number of them in each process.

`dar.training.parallel.deepspeed` holds the parts that are specific to DeepSpeed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from dar.training.parallel import deepspeed

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def is_sharded(model: nn.Module) -> bool:
    return deepspeed.is_cut(model) or any(
        isinstance(module, FSDPModule) for module in model.modules()
    )


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Gather all weights on every process; forward passes inside need no other. Collective."""
    if deepspeed.is_cut(model):
        with deepspeed.whole(model):
            yield
        return
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(reshard_after_forward=False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
            # The backward pass needs the root first, so it stays gathered after the forward pass.
            module.set_reshard_after_forward(
                reshard_after_forward=module is not model, recurse=False
            )


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a sharded model, on the CPU of process 0; empty elsewhere. Collective."""
    if deepspeed.is_cut(model):
        return deepspeed.whole_weights(model)
    weights: Any = get_model_state_dict(model, options=WHOLE)
    return cast("dict[str, Tensor]", weights)


def whole_optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's ``state_dict`` as it is without shards, on process 0; empty elsewhere."""
    named: Any = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    if not named:
        return {}
    names = [name for group in named["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    return {
        "state": {numbers[name]: values for name, values in named["state"].items()},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]]}
            for group in named["param_groups"]
        ],
    }


def load_whole_optimizer_state(
    model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]
) -> None:
    """Load an unsharded optimizer's state into a sharded one; every process has all of it."""
    own: Any = get_optimizer_state_dict(model, optimizer)
    groups = [
        {**group, "params": mine["params"]}
        for group, mine in zip(state["param_groups"], own["param_groups"], strict=True)
    ]
    names = [name for group in groups for name in group["params"]]
    set_optimizer_state_dict(
        model,
        optimizer,
        {
            "state": {names[number]: values for number, values in state["state"].items()},
            "param_groups": groups,
        },
        options=StateDictOptions(full_state_dict=True),
    )
