"""Launchers of the CUDA kernels: checked, dense tensors in GPU memory go to them as addresses and codes."""
