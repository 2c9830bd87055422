"""Look inside a network and change it: taps and edits, its parts, what its words are, surgery, a trace."""
