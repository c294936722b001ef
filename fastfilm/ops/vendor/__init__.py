"""PyTorch's convolutions and the guards around their faults."""

from .convolutions import convolution, convolution_backward
from .faults import safe_convolution
