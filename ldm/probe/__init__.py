"""Questions to a network about its own structure: which part carries an attribute, where a word looks."""
