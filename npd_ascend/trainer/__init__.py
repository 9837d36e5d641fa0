"""Packs into gradients, gradients into weights."""
