"""The command lines: arguments in, exit status out. The place where an engine is chosen."""
