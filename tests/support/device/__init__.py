"""One file for each kind of device that the matrix of devices goes through."""
