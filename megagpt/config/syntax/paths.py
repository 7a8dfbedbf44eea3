"""Expand `~` and environment variables in the paths of a config file."""

from __future__ import annotations

import os
import re

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def expand_path(path: str) -> str:
    """Return a path with a leading `~` and every `$NAME` or `${NAME}` expanded, as a shell does.

    A shell expands them only where they are not quoted, and never in a file. Without this a run would create folders
    that are really named `~` or `$SCRATCH`.

    Args:
        path: a path as the user wrote it.

    Raises:
        ValueError: if a variable is not set or empty, or if there is no such user. The message states which.
    """
    for match in _VARIABLE.finditer(path):
        name = match[1] or match[2]
        if not os.environ.get(name):
            raise ValueError(f"the environment variable {name} is not set")
    user = path.partition("/")[0]
    expanded = os.path.expanduser(path)
    if user.startswith("~") and expanded == path:
        raise ValueError(f"there is no home directory of {user}")
    return os.path.expandvars(expanded)
