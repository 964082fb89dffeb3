"""Weights that are cut into shards, one for each process (FSDP2, ZeRO-3): made whole to sample, and to be written down.

A forward pass of a sharded model is full of collectives, and all processes must make the same number of them. Sampling cannot
promise that: completions end where they end. So whoever only reads the weights makes them whole first, on every process, and
is then alone with them. Training passes stay sharded; `StepTrainer` gives each process as many of them.

What is particular to DeepSpeed lies in `dar.training.parallel.deepspeed`.
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
    """Whether any weight of ``model`` is cut into shards."""
    return deepspeed.is_cut(model) or any(
        isinstance(module, FSDPModule) for module in model.modules()
    )


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Have all weights on every process, so that forward passes inside need no other process. Entered by all together."""
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
            # The root is needed again at once when the backward pass begins.
            module.set_reshard_after_forward(
                reshard_after_forward=module is not model, recurse=False
            )


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a sharded model, on the CPU of process 0; empty elsewhere. Called by all together."""
    if deepspeed.is_cut(model):
        return deepspeed.whole_weights(model)
    weights: Any = get_model_state_dict(model, options=WHOLE)
    return cast("dict[str, Tensor]", weights)


def whole_optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """State of the optimizer of a sharded model as its ``state_dict`` would be without shards; empty but on process 0."""
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
    """Put what `whole_optimizer_state` or an optimizer without shards gave, of which every process has all, into a sharded one."""
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
