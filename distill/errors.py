"""What distillation refuses."""

from ditc.kernels.errors import DitcError


class DistillError(DitcError, ValueError):
    """A subject, method, configuration or checkpoint that cannot be trained with; the message says what would be."""
