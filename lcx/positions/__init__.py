"""Positions: how a model learns where its tokens are, exactly and at any length."""
