"""The `key=value` grammar of option strings, and the structs it gives."""
