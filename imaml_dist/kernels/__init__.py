"""Kernels of our own where torch's are slow for networks with parameters of their own in every task."""
