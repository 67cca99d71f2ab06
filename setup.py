"""Packaging only: names, version, dependencies and extras. Tool settings are in pyproject.toml.

`kernels/` and `simulators/` lie at the top of the repository without an `__init__.py` (a package
called `kernels` exists on PyPI and must not be shadowed) and are installed as `nxd_cp.kernels` and
`nxd_cp.simulators`. The two links in `nxd_cp/` serve a clone that is used without an install; the
`package_dir` entries serve archives in which links do not survive.

The floors of the Neuron extras are above the placeholder packages that PyPI holds under those
names, so that an install without the vendor's index ends in "no matching distribution" and not in
a broken import.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

TEST = [
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "build>=1.2",
    "setuptools>=77",
]
SIMULATOR = ["numpy>=1.26", "ml_dtypes>=0.5"]
PLOT = ["matplotlib>=3.8"]
HUGGING_FACE = ["transformers>=5.0"]

EXTRAS = {
    "sim": SIMULATOR,
    "plot": PLOT,
    "hf": HUGGING_FACE,
    # The next four need the vendor's index; xla and native exclude each other.
    "nki": ["nki>=0.3"],
    "xla": ["torch-neuronx>=2.9,<2.10", "neuronx-cc>=2.24,<3"],
    "native": ["torch-neuronx>=2.13.3"],
    "nxd": ["neuronx-distributed>=0.17"],
    "test": [*TEST, *SIMULATOR, *PLOT, *HUGGING_FACE],
    "dev": [*TEST, *SIMULATOR, *PLOT, *HUGGING_FACE, "ruff>=0.12", "mypy>=1.15", "pre-commit>=4"],
}


def packages() -> list[str]:
    """`nxd_cp` and its sub-packages, with the two linked folders under their import names."""
    own = find_packages(include=["nxd_cp", "nxd_cp.*"])
    linked = [f"nxd_cp.{top}" for top in ("kernels", "simulators")]
    below = [
        f"nxd_cp.{top}.{name}" for top in ("kernels", "simulators") for name in find_packages(top)
    ]
    return sorted({*own, *linked, *below})


setup(
    name="nxd-cp",
    version="0.1.0",
    description="Context parallelism for AWS Neuron: ring attention, NKI kernels and a simulator",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=packages(),
    package_dir={"nxd_cp.kernels": "kernels", "nxd_cp.simulators": "simulators"},
    package_data={"nxd_cp": ["py.typed"], "nxd_cp.simulators.timing": ["data/*.csv"]},
    # `import nxd_cp` needs torch alone; the other two serve the command line.
    install_requires=["torch>=2.8", "typer>=0.12", "rich>=13"],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "nxd-cp = nxd_cp.cli:main",
            "nki-sim = nxd_cp.simulators.nki_api.cli:main",
        ],
        "pytest11": ["nki-simulator = nxd_cp.simulators.pytest_plugin"],
    },
)
