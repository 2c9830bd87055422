"""Room for fused Triton kernels, one op a file. It holds none yet: `ldm.ops` is plain torch on every device."""
