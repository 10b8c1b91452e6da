"""Tools that check the kernels, compile them ahead, and time them."""
