"""The privacy mechanism: sampling, clipping, noise, and what they cost."""
