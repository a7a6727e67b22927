"""The HTTP grammar, without I/O."""
