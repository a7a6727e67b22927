"""`--trace`: where the time of a start, of each command and of a guest's boot goes. Loaded if asked for.

`file.py` writes spans in Chrome's trace format, `table.py` says which functions become spans and wraps them,
`guest.py` reads off a serial port how far a guest is.
"""
