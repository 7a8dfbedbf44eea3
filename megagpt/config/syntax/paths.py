"""Expand `~` and environment variables in the paths of a config file."""

from __future__ import annotations

import os
import re

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def expand_path(path: str) -> str:
    """Expand a leading `~` and every `$NAME` or `${NAME}` in a path, as a shell does.

    A shell does not expand quoted arguments or the content of files. Without this function, a run would create folders
    that are literally named `~` or `$SCRATCH`.

    Args:
        path: a path as the user wrote it.

    Returns:
        The expanded path.

    Raises:
        ValueError: A variable is not set or is empty, or the user does not exist. The message names the variable or
            user.
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
