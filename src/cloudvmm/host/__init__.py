"""The operating system at the rim: eventfd, descriptors, processes, TAP, locks, terminals."""
