"""Secure aggregation: encoding, keys, masks, secret shares, neighbours, roster. No torch, no network."""
