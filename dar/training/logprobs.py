"""Log-probabilities of completions, in forward passes of bounded memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from dar.training.data import TokenPair

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
        batch: B sequences as `dar.training.data.DataCollatorForDAR` lays them out, on the model's device.

    Returns:
        ``[B]`` float32: sums over the tokens of each completion, in nats.
    """
    mask_BC = batch["completion_mask"]
    width = mask_BC.shape[1]
    logits_BCV = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        use_cache=False,
        logits_to_keep=width + 1,
    ).logits[:, :-1]
    losses_BC = nn.functional.cross_entropy(
        logits_BCV.float().flatten(0, 1),
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
    is_bf16: bool = False,
    before_each: Callable[[], None] = lambda: None,
) -> Tensor:
    """Log-probabilities of any number of completions, without gradients and without dropout.

    Args:
        model: A causal language model; it is left in evaluation mode.
        pairs: B sequences.
        collate: Lays out the sequences of a forward pass.
        vocabulary: Size of the model's vocabulary.
        is_bf16: Whether forward passes run under bfloat16 autocast.
        before_each: Called before each forward pass; may raise to stop.

    Returns:
        ``[B]`` float32 on the CPU, in nats.
    """
    model.eval()
    device = next(model.parameters()).device
    logps_B = torch.zeros(len(pairs))
    for rows in forward_batches(pairs, vocabulary):
        before_each()
        batch = {k: v.to(device) for k, v in collate([pairs[i] for i in rows]).items()}
        with autocast(device, is_bf16=is_bf16):
            logps_B[rows] = completion_logps(model, batch).cpu()
    return logps_B


def autocast(device: torch.device, *, is_bf16: bool) -> AbstractContextManager[object]:
    """Bfloat16 autocast on ``device``, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if is_bf16 else nullcontext()
