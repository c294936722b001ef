"""What compiled kernels say of themselves: registers, instructions, and the clocks that they should take."""
