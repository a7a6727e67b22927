"""The binaries; the place where an engine is chosen."""
