"""Training a small part of a model: low-rank adapters, and which parameters are frozen."""
