from setuptools import setup  # all metadata is in setup.cfg

setup()
