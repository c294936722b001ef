"""The C++ kernels as a backend: the functions of ``launchers.interface.Kernels``, gathered from its folder."""

from .coefficients import block_coefficients, block_coefficients_backward, covers_block
from .convolution import (
    convolution,
    convolution_gradients,
    convolve,
    convolve_dgrad,
    convolve_wgrad,
)
from .gather import gather, gather_backward, workspace
from .passes import (
    apply,
    apply_backward,
    moments,
    moments_backward,
    residual,
    residual_backward,
)

reads_sources = False
convolves = True
