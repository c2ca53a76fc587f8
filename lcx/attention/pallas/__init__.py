"""Kernels written for a particular kind of accelerator."""
