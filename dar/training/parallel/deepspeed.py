"""Weights and optimizer state under DeepSpeed (ZeRO-2, ZeRO-3): gathered to be read.

ZeRO-2 keeps every weight whole on every process and shards gradients and optimizer state; ZeRO-3
shards the weights too. A checkpoint has the same content as without DeepSpeed: the optimizer's
state by weight, in the order of `transformers.Trainer`.

Functions that gather are collectives, which all processes must call together.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dar.training.parallel import deepspeed_config

Groups = Sequence[Mapping[str, Any]]
"""Parameter groups of an optimizer before DeepSpeed wrapped it: weights under ``params``."""


def is_cut(model: nn.Module) -> bool:
    """Whether ZeRO-3 has sharded the weights of ``model``."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def cut(model: nn.Module) -> None:
    """Shard a model that is only read: each process keeps its share of every weight. Collective."""
    deepspeed = deepspeed_config.load()
    deepspeed.zero.Init(module=model, dtype=torch.float32, mem_efficient_linear=False)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Gather all weights of a sharded model on every process, for reading. Collective."""
    deepspeed = deepspeed_config.load()
    offload = _offload(model)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        if offload is not None:
            _remove_hooks(offload)
        try:
            yield
        finally:
            if offload is not None:
                offload._register_deepspeed_module(offload.module)  # noqa: SLF001 - as DeepSpeed does to generate


def _offload(model: nn.Module) -> Any:  # noqa: ANN401 - DeepSpeed has no annotations
    """The object that fetches and releases weights around layers; None if none is trained."""
    for parameter in model.parameters():
        # ZeRO-3 links every trained weight to its optimizer; there is no public way to it.
        optimizer = getattr(parameter, "_z3_optimizer", None)
        if optimizer is not None:
            return optimizer.parameter_offload
    return None


def _remove_hooks(offload: Any) -> None:  # noqa: ANN401 - DeepSpeed has no annotations
    """Keep forward passes from releasing weights, which would be fetched again by a collective."""
    for parameter in offload.module.parameters():
        parameter.ds_active_sub_modules.clear()
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a sharded model, on the CPU of process 0; empty elsewhere. Collective."""
    with whole(model):
        if torch.distributed.get_rank() != 0:
            return {}
        copies: dict[int, Tensor] = {}  # tied weights stay one tensor
        return {
            name: copies.setdefault(id(tensor), tensor.detach().cpu().clone())
            for name, tensor in model.state_dict(keep_vars=True).items()
        }


def whole_optimizer_state(
    optimizer: Any,  # noqa: ANN401 - DeepSpeed has no annotations
    groups: Groups,
    *,
    is_main: bool,
) -> dict[str, Any]:
    """State of DeepSpeed's optimizer in the form that torch's has without shards. Collective.

    Args:
        optimizer: DeepSpeed's.
        groups: Those of torch's optimizer, before DeepSpeed wrapped it.
        is_main: Whether this process keeps the result; the others get an empty one.
    """
    _link(optimizer)
    gather = deepspeed_config.load().utils.safe_get_full_optimizer_state
    # All states have the same names; only sizes differ.
    first: dict[str, Tensor] = next(iter(optimizer.optimizer.state.values()), {})
    state: dict[int, dict[str, Any]] = {}
    for number, parameter in enumerate(_weights(groups)):
        for name, value in first.items():
            whole_value = gather(parameter, name) if _is_cut_up(value) else value
            if is_main:
                state.setdefault(number, {})[name] = whole_value.cpu().clone()
    if not is_main:
        return {}
    numbers = iter(range(len(list(_weights(groups)))))
    plain = [
        {**own, "params": [next(numbers) for _ in group["params"]]}
        for group, own in zip(groups, optimizer.optimizer.param_groups, strict=True)
    ]
    return {"state": state, "param_groups": plain}


def load_whole_optimizer_state(
    optimizer: Any,  # noqa: ANN401 - DeepSpeed has no annotations
    groups: Groups,
    state: Mapping[str, Any],
) -> None:
    """Load an unsharded optimizer's state into DeepSpeed's; every process has all of it."""
    base = optimizer.optimizer
    for own, saved in zip(base.param_groups, state["param_groups"], strict=True):
        own |= {name: value for name, value in saved.items() if name != "params"}
    if not state["state"]:
        return
    is_on_device = any(base.defaults.get(name) for name in ("fused", "capturable"))
    for piece in _pieces(optimizer):
        base.state[piece] = {
            name: torch.zeros_like(piece)
            if _is_cut_up(value)
            else value.to(piece.device if is_on_device else "cpu", copy=True)
            for name, value in state["state"][0].items()
        }
    _link(optimizer)
    for number, parameter in enumerate(_weights(groups)):
        for name, value in state["state"][number].items():
            if _is_cut_up(value):
                _set(parameter, name, value.to(parameter.device))


def _weights(groups: Groups) -> Iterator[nn.Parameter]:
    return (parameter for group in groups for parameter in group["params"])


def _is_cut_up(value: Tensor) -> bool:
    """Whether this part of an optimizer's state has a value for each element of a weight."""
    return value.dim() > 0


def _pieces(optimizer: Any) -> Sequence[Tensor]:  # noqa: ANN401 - DeepSpeed has no annotations
    """Tensors that DeepSpeed's inner optimizer updates: slices of flattened weights."""
    pieces: Sequence[Tensor] | None = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    return optimizer.single_partition_of_fp32_groups if pieces is None else pieces


def _link(optimizer: Any) -> None:  # noqa: ANN401 - DeepSpeed has no annotations
    """Make ZeRO-2 link each weight with its part of the state.

    It does so itself once the first group has stepped, and misses the other groups.
    """
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False  # noqa: SLF001 - there is no public way
        optimizer._lazy_init_hp_params_optimizer_state()  # noqa: SLF001 - there is no public way


def _set(parameter: Any, name: str, value: Tensor) -> None:  # noqa: ANN401 - DeepSpeed's attributes
    utils = deepspeed_config.load().utils
    if not hasattr(parameter, "ds_id"):
        utils.safe_set_full_optimizer_state(parameter, value, name)
        return
    # ZeRO-3 pads the last share; its function for whole values neither pads nor accepts padding.
    size, index = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    share = value.new_zeros(size)
    part = value.flatten()[size * index : size * (index + 1)]
    share[: part.numel()] = part
    utils.safe_set_local_optimizer_state(parameter, share, name)
