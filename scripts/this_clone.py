"""Imported by every script: `nxd_cp` is then that of this clone, installed or not.

Also lets scripts import the helpers of `tests/`.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
