"""Moving handwritten digits: a small video diffusion transformer, its training, its judge and the demo."""
