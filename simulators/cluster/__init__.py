"""A ring of positions on simulated chips: step time, exposed communication, efficiency.

    from nxd_cp.schedule import make_plan
    from nxd_cp.simulators.cluster.kernel_time import Rate
    from nxd_cp.simulators.cluster.ring import Model, simulate
    from nxd_cp.simulators.cluster.topology import Cluster

Reading order: topology.py, links.py, kernel_time.py, ring.py, measure.py. Estimates only: the
published times of collectives disagree with each other by a factor of fifty.
"""
