"""A network's parameters as one flat float32 vector, in ``named_parameters`` order."""

import numpy as np
import torch
from torch import nn

from common.messages import Vector


def to_vector(module: nn.Module) -> Vector:
    """All parameters, flattened and joined: shape (dim,), a copy on the CPU."""
    flat = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    return np.asarray(flat.cpu().numpy(), dtype=np.float32).copy()


def load_vector(module: nn.Module, vector: Vector) -> None:
    """Overwrite the parameters of ``module`` in place. Raises ValueError for another length or values not finite."""
    parameters = list(module.parameters())
    expected = sum(parameter.numel() for parameter in parameters)
    if vector.shape != (expected,):
        raise ValueError(f"expected a vector of {expected} parameters, found shape {vector.shape}")
    if not np.isfinite(vector).all():
        raise ValueError("expected finite parameters, found NaN or Inf")
    offset = 0
    with torch.no_grad():
        for parameter in parameters:
            count = parameter.numel()
            part = torch.from_numpy(vector[offset : offset + count].copy())
            parameter.copy_(part.view_as(parameter))  # (count,) -> the parameter's own shape
            offset += count
