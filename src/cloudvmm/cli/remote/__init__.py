"""The command `cloudvmm-remote`, the drop-in for `ch-remote`: one sub-command, one request, one answer.

`command.py` is the table of sub-commands, `parser.py` the command line's own form, `request.py` what becomes
of the arguments. `rest.py` and `bus.py` carry a request out, `report.py` prints what failed.
"""
