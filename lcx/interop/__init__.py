"""Hugging Face checkpoints in and out: configs, weights, and what stands beside them."""
