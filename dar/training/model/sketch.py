"""Digest and size of a model's weights."""

import hashlib

import torch
from torch import nn

SKETCHED_VALUES = 256
"""Leading values of each parameter in a sketch: enough to distinguish models, and cheap."""


def weights_sketch(model: nn.Module) -> str:
    """SHA-256 of names, shapes and leading values of a model's parameters."""
    sketch = hashlib.sha256()
    for name, parameter in model.named_parameters():
        leading = parameter.detach().flatten()[:SKETCHED_VALUES].to("cpu", torch.float32)
        sketch.update(f"{name} {tuple(parameter.shape)} ".encode())
        sketch.update(leading.numpy().tobytes())
    return sketch.hexdigest()


def weights_bytes(module: nn.Module | None) -> int:
    """Bytes of a module's weights; 0 for None."""
    return 0 if module is None else sum(p.numel() * p.element_size() for p in module.parameters())
