"""Fused Triton kernels, one op a file: kernel, launcher, registration with torch, what the compiler is to make of it.

`ldm.fast.backend` decides where they run. Read geglu.py first, then add_layer_norm.py,
group_norm_silu.py, attention.py.
Nothing here is imported on a machine without a GPU, but by tests and by `ldm bench kernels`.
"""
