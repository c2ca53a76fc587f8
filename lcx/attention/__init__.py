"""Attention: the oracle, the tiled kernel, and the choice between them."""
