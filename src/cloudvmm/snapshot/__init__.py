"""The form of a VM on disk: what a snapshot's folder holds, and how it is written whole or not at all."""
