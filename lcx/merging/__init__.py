"""Models merged tensor by tensor: folders of safetensors in, one new folder out."""
