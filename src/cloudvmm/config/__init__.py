"""What a VM is, and the rules about it. Pure data: no I/O beyond `stat` of paths that a rule names."""
