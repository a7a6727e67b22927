"""The VMM thread: loop, lifecycle table, request handlers, worker, journal."""
