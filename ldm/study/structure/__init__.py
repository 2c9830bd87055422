"""The network's structure on phantoms: which part carries an attribute, where a word looks, where edits are lines."""
