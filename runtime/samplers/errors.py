"""What a sampler refuses."""

from ditc.kernels.errors import DitcError


class SamplerError(DitcError, ValueError):
    """A sampler manifest is wrong, or was asked for something that contradicts it."""
