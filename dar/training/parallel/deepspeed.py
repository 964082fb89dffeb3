"""Weights and optimizer state that DeepSpeed has cut (ZeRO-2, ZeRO-3): made whole to be read, and cut again.

ZeRO-2 leaves every weight whole on every process and cuts gradients and optimizer state; ZeRO-3 cuts the weights too. What a
checkpoint holds is the same as without DeepSpeed: the optimizer's state by weight, in the order of `transformers.Trainer`.

What gathers here is a collective, which all processes must reach together.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dar.training.parallel import deepspeed_config

Groups = Sequence[Mapping[str, Any]]
"""Parameter groups of an optimizer as they were before DeepSpeed took it: weights under ``params``."""


def is_cut(model: nn.Module) -> bool:
    """Whether ZeRO-3 has cut the weights of ``model``."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def cut(model: nn.Module) -> None:
    """Cut a model that is only read: each process keeps its share of every weight. Called by all together."""
    deepspeed = deepspeed_config.load()
    deepspeed.zero.Init(module=model, dtype=torch.float32, mem_efficient_linear=False)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Have all weights of a cut model on every process, to be read. Entered by all together, left alone."""
    deepspeed = deepspeed_config.load()
    offload = _offload(model)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        if offload is not None:
            _take_hooks_off(offload)
        try:
            yield
        finally:
            if offload is not None:
                offload._register_deepspeed_module(offload.module)  # noqa: SLF001 - as DeepSpeed does to generate


def _offload(model: nn.Module) -> Any:  # noqa: ANN401 - DeepSpeed has no annotations
    """What fetches and releases the weights of a trained model around its layers; None for a model that is only read."""
    for parameter in model.parameters():
        optimizer = getattr(parameter, "_z3_optimizer", None)
        if optimizer is not None:
            return optimizer.parameter_offload
    return None


def _take_hooks_off(offload: Any) -> None:  # noqa: ANN401 - DeepSpeed has no annotations
    """Keep forward passes from releasing weights, and fetching them again from processes that are elsewhere."""
    for parameter in offload.module.parameters():
        parameter.ds_active_sub_modules.clear()
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a cut model, on the CPU of process 0; empty elsewhere. Called by all together."""
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
    """State of DeepSpeed's optimizer as torch's would be without shards; empty but on the main process.

    Called by all together.

    Args:
        optimizer: DeepSpeed's.
        groups: Of torch's optimizer, before DeepSpeed took it.
        is_main: Whether this process keeps the result.
    """
    _link(optimizer)
    gather = deepspeed_config.load().utils.safe_get_full_optimizer_state
    first: dict[str, Tensor] = next(
        iter(optimizer.optimizer.state.values()), {}
    )  # the others differ in sizes alone
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
    """Put what `whole_optimizer_state` or an optimizer without shards gave, of which every process has all, into DeepSpeed's."""
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
    """Whether this part of an optimizer's state belongs to single elements of a weight, and not to the weight."""
    return value.dim() > 0


def _pieces(optimizer: Any) -> Sequence[Tensor]:  # noqa: ANN401 - DeepSpeed has no annotations
    """What the optimizer inside of DeepSpeed's steps: slices of flattened weights."""
    pieces: Sequence[Tensor] | None = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    return optimizer.single_partition_of_fp32_groups if pieces is None else pieces


def _link(optimizer: Any) -> None:  # noqa: ANN401 - DeepSpeed has no annotations
    """Have ZeRO-2 find each weight's part of the state: it looks when the first group has stepped, and misses the others'."""
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False  # noqa: SLF001 - there is no public way
        optimizer._lazy_init_hp_params_optimizer_state()  # noqa: SLF001 - there is no public way


def _set(parameter: Any, name: str, value: Tensor) -> None:  # noqa: ANN401 - DeepSpeed's attributes
    utils = deepspeed_config.load().utils
    if not hasattr(parameter, "ds_id"):
        utils.safe_set_full_optimizer_state(parameter, value, name)
        return
    # ZeRO-3 fills the last share up; its function for whole values leaves the filling to the caller, and refuses it.
    size, index = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    share = value.new_zeros(size)
    part = value.flatten()[size * index : size * (index + 1)]
    share[: part.numel()] = part
    utils.safe_set_local_optimizer_state(parameter, share, name)
