"""Everything that is counted or checked without a clock: kernels, maps, launches, machine code, right results."""
