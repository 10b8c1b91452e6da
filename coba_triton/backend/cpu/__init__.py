"""The CPU path: kernels that Numba compiles, and what launches them."""
