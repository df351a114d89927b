"""What control asks of a node and what a node answers: frozen values without I/O, by noun, and the `Node` protocol."""
