"""What `nxd-cp doctor` finds out: packages, devices, the backend that will be used, legal rings."""
