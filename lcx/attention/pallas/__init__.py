"""Kernels written for one kind of accelerator."""
