"""Float32 matrix products on CPU through oneDNN, where that is as accurate as float32."""

from .fp32 import ERROR_BOUND, Fp32MatmulError, fp32_matmul, fp32_matmul_error, fp32_matmul_reason

__all__ = ["ERROR_BOUND", "Fp32MatmulError", "fp32_matmul", "fp32_matmul_error", "fp32_matmul_reason"]
