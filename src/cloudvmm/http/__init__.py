"""The REST front end on a UNIX socket."""
