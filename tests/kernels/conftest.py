"""Kernels run in Triton's interpreter here, on CPU tensors: what is tested is what they compute, not how fast."""

import os
import sys

# Triton reads this when a kernel is decorated, also those of its own library: so before its first import.
if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("triton was imported before tests/kernels/conftest.py could ask for its interpreter")
os.environ["TRITON_INTERPRET"] = "1"
