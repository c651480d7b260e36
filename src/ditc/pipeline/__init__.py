"""Diffusers pipelines around compiled transformers: :func:`ditc.optimize` and the scheduler of a manifest."""
