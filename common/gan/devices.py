"""Which device to compute on."""

import torch

from common.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU when there is one. Raises ConfigError when ``cuda`` is asked for and absent."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("Expected a CUDA device, found none.", "Use --device cpu, or install a CUDA build of torch.")
    if name == "cuda" or (name == "auto" and available):
        return torch.device("cuda")
    return torch.device("cpu")
