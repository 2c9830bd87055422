"""The experiment scored: what is measured on every seed, and what the seeds say together."""
