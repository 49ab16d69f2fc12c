"""Triton kernels of the CUDA target, one a file, each beside what it computes in plain torch. Needs triton to run."""
