"""What runs a VM: the seam in `base`, and the engines behind it."""
