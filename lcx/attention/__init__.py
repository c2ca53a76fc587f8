"""Attention: the reference implementation, the tiled kernels, and the choice between them."""
