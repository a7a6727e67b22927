"""VMMs inside other programs."""
