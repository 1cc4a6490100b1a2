"""Arithmetic on tensors: no modules, no models."""
