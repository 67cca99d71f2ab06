"""Context parallelism for AWS Neuron devices: the public names, and nothing else.

Importing this package needs torch alone; kernels and simulator are loaded when a backend asks.
"""

__version__ = "0.1.0"
