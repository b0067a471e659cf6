"""Compiled kernels (``torchgsrq.kernels``). None yet: the pure-PyTorch reference runs everywhere."""
