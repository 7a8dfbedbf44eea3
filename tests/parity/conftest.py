"""The parity run: each world size once per session, with just the layouts that were asked for."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
