"""Speed, installed into a loaded network from outside."""
