"""What computes: the reference, the CPU path and the Triton kernels.

The name is singular because torch.compile does not look into files whose path has ``triton/backends`` in it.
"""
