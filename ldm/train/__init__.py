"""Training: the one loop, and what each network is trained on."""
