"""`python -m megagpt.distributed`: a free port, for scripts that must name one to a launcher."""

from megagpt.distributed import free_port

print(free_port())
