"""Many ranks and cores in one process: the scheduler, the world, and how a kernel is launched."""
