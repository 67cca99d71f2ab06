"""`python -m nxd_cp` is the command nxd-cp."""

from nxd_cp.cli import main

if __name__ == "__main__":
    main()
