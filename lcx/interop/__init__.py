"""Import and export of Hugging Face checkpoints: configs, weights, and the files next to them."""
