"""Event fan-out: one emitter, any number of listeners."""
