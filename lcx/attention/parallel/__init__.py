"""Attention over a sequence that is split across devices."""
