"""Changes what a model sees: fewer tokens, zeros in their place, or other pixels."""
