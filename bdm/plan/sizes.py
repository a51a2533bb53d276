"""Sizes that plans of all kinds reckon with."""

GIB = 2**30

#: Assumed, not measured: CUDA's context with the kernels' code and cuBLAS's workspace, and NCCL's buffers
#: beside it.
CUDA_CONTEXT, NCCL = 0.7 * GIB, 0.5 * GIB
