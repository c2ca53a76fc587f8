"""Positions: how a model is told where its tokens are, exactly and at any length."""
