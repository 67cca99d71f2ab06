"""Run other people's NKI kernels, unmodified, on the simulator; see docs/public_kernels.md."""

import sys

import this_clone  # noqa: F401

from nxd_cp.simulators.public_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
