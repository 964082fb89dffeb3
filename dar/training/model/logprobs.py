"""Log-probabilities of completions, in forward passes of bounded memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from dar.training.data.rows import TokenPair
from dar.training.loss import precise

MAX_ROWS = 64
"""Most sequences in one forward pass."""
MAX_TOKENS = 16_384
"""Most positions in one forward pass, padding included."""
MAX_LOGITS = 2**28
"""Most logits in one forward pass: 1 GiB of float32."""

Collator = Callable[[Sequence[TokenPair]], Mapping[str, Tensor]]


def completion_logps(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Log-probabilities of completions under ``model`` at temperature 1.

    Args:
        model: A causal language model.
        batch: B sequences of `dar.training.data.rows.DataCollatorForDAR`, on the model's device.

    Returns:
        ``[B]``: sums over the tokens of each completion, in nats; float64 for a float64 model, else
        float32.
    """
    return _summed_logps(_completion_logits(model, batch), batch)


def logps_and_entropies(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The same as `completion_logps`, with the entropies of the policy's distributions.

    Args:
        model: A causal language model.
        batch: As for `completion_logps`.

    Returns:
        Log-probabilities ``[B]``, and entropies ``[B]`` of the next token at temperature 1, summed
        over the tokens of each completion, in nats, without gradient.
    """
    logits_BCV = _completion_logits(model, batch)
    with torch.no_grad():  # one sequence at a time: probabilities take as much memory as logits
        entropies_B = torch.stack(
            [
                torch.special.entr(precise(logits_CV[mask_C]).softmax(dim=-1)).sum()
                for logits_CV, mask_C in zip(logits_BCV, batch["completion_mask"], strict=True)
            ]
        )
    return _summed_logps(logits_BCV, batch), entropies_B


def _completion_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """``[B, C, V]`` logits of the completions' tokens."""
    logits_BCV: Tensor = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        use_cache=False,
        logits_to_keep=batch["completion_mask"].shape[1] + 1,
    ).logits[:, :-1]
    return logits_BCV


def _summed_logps(logits_BCV: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    mask_BC = batch["completion_mask"]
    width = mask_BC.shape[1]
    losses_BC = nn.functional.cross_entropy(
        precise(logits_BCV).flatten(0, 1),
        batch["input_ids"][:, -width:].flatten(),
        reduction="none",
    ).view(-1, width)
    return -losses_BC.masked_fill(~mask_BC, 0.0).sum(dim=1)


def forward_batches(pairs: Sequence[TokenPair], vocabulary: int) -> Iterator[list[int]]:
    """Split sequences into forward passes of bounded memory, long ones first to save padding.

    Args:
        pairs: The sequences.
        vocabulary: Size of the model's vocabulary.

    Yields:
        Indices into ``pairs``; every index once.
    """
    batch: list[int] = []
    widths = (0, 0)
    for i in sorted(range(len(pairs)), key=lambda i: (-pairs[i].total, i)):
        own = len(pairs[i].prompt_ids), len(pairs[i].completion_ids)
        prompt, completion = max(widths[0], own[0]), max(widths[1], own[1])
        rows = len(batch) + 1
        if batch and (
            rows > MAX_ROWS
            or rows * (prompt + completion) > MAX_TOKENS
            or rows * (completion + 1) * vocabulary > MAX_LOGITS
        ):
            yield batch
            batch = []
            prompt, completion = own
        batch.append(i)
        widths = prompt, completion
    if batch:
        yield batch


@torch.no_grad()
def all_logps(
    model: nn.Module,
    pairs: Sequence[TokenPair],
    *,
    collate: Collator,
    vocabulary: int,
    half: torch.dtype | None = None,
    before_each: Callable[[], None] = lambda: None,
    with_entropies: bool = False,
) -> Tensor:
    """Log-probabilities of any number of completions, without gradients and without dropout.

    Args:
        model: A causal language model; it is left in evaluation mode.
        pairs: B sequences.
        collate: Makes a batch of the sequences of one forward pass.
        vocabulary: Size of the model's vocabulary.
        half: Number format that forward passes are cast to; None: no cast.
        before_each: Called before each forward pass; may raise to stop.
        with_entropies: Whether to return the summed entropies too; see `logps_and_entropies`.

    Returns:
        ``[B]`` on the CPU, in nats, or ``[2, B]`` with the entropies in the second row; float64 for
        a float64 model, else float32.
    """
    model.eval()
    parameter = next(model.parameters())
    device = parameter.device
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    values_NB = torch.zeros(1 + with_entropies, len(pairs), dtype=dtype)
    for rows in forward_batches(pairs, vocabulary):
        before_each()
        batch = {k: v.to(device) for k, v in collate([pairs[i] for i in rows]).items()}
        with autocast(device, half):
            measured = (
                logps_and_entropies(model, batch)
                if with_entropies
                else (completion_logps(model, batch),)
            )
            values_NB[:, rows] = torch.stack(measured).cpu()
    return values_NB if with_entropies else values_NB[0]


def autocast(device: torch.device, half: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast on ``device`` to this number format; None: no autocast."""
    return nullcontext() if half is None else torch.autocast(device.type, dtype=half)


def idle_weights(model: nn.Module) -> list[str]:
    """Names of trained weights that no log-probability depends on, as of an image encoder."""
    device = next(model.parameters()).device
    ones = torch.ones((1, 2), dtype=torch.long, device=device)
    batch = {
        "input_ids": 0 * ones,
        "attention_mask": ones,
        "position_ids": ones.cumsum(dim=1) - 1,
        "completion_mask": ones[:, 1:].bool(),
    }
    is_training = model.training
    model.eval()  # activation checkpointing would hide weights from the graph
    with torch.enable_grad():
        reached = [completion_logps(model, batch).grad_fn]
    model.train(is_training)
    seen = set(reached)
    used: set[int] = set()
    while reached:
        node = reached.pop()
        used.add(id(getattr(node, "variable", None)))
        new = {following for following, _ in (node.next_functions if node else ())} - seen - {None}
        seen |= new
        reached += new
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in used
    ]
