"""Run other people's NKI kernels, unmodified, on the simulator; see docs/public_kernels.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nxd_cp.simulators.public_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
