"""Triton kernels for NVIDIA GPUs from sm_80 on: convolutions between pending activations."""
