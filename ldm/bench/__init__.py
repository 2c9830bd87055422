"""What `ldm bench` measures: samplers, networks, the whole traversal, the kernels. One harness, one file a subject."""
