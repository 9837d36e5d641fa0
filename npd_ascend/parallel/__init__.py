"""Tensor and data parallelism, applied to the plain decoder from outside."""
