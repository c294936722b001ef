"""Launchers of the C++ kernels: checked, dense tensors in host memory go to them as addresses and codes."""
