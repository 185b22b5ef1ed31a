"""Training on all GPUs from a cell: `notebook_launch`.

launching          in the kernel: starts workers, streams what they print, stops them, returns what they return
worker             the other side
"""
