"""Adapters for training stacks; each module needs its stack and is imported by name."""
