"""Worked extensions of the U-Net, each a short file: nothing in the core changes for them."""
