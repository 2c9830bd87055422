"""Trajectories through the latent space: prompt trees, curves, inversion, run folders."""
