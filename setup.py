"""Package metadata. Installing needs neither a compiler nor a GPU; importing needs neither either."""

from pathlib import Path

from setuptools import find_packages, setup

# numpy: the pyarrow that datasets takes refuses 1.x, though its metadata does not say so. pyyaml: 6.0 has no wheel for
# Python 3.12, and does not build with Cython 3.
TRAIN = [
    "accelerate>=1.10",
    "datasets>=4",
    "filelock>=3.12",
    "matplotlib>=3.8",
    "numpy>=2",
    "tokenizers>=0.21",
    "tqdm>=4.66",
    "transformers>=5",
]

setup(
    name="stride-memory-transformer",
    version="0.1.0",
    description="A language model with a fixed attention window and a Mamba memory, and its Triton kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["smt", "smt.*", "smt_kernels", "smt_kernels.*"]),
    package_data={
        "smt": ["configs/*.yaml"],
        "smt.experiments": ["studies/*.yaml"],
        "smt.study": ["configs/*.yaml"],
        "smt.huggingface": ["model_card.md"],
        "smt_kernels.testing.null_gpu": ["runtime.c"],
    },
    install_requires=[
        "torch>=2.10",
        "triton>=3.6; platform_system == 'Linux'",
        "pyyaml>=6.0.1",
        "safetensors>=0.4",
    ],
    extras_require={
        "train": TRAIN,
        "hf": ["transformers>=5"],
        "pretrained": ["huggingface-hub>=0.26"],  # to load from hub names; folders need nothing
        "docs": ["mkdocs>=1.6", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.30", "ruff>=0.6"],
        "cuda": ["mamba-ssm>=2.2", "causal-conv1d>=1.4"],  # for Hugging Face's Mamba, which benchmarks compare with
        "test": [
            *TRAIN,
            "hypothesis>=6.100",
            "pytest>=8",
            "pytest-benchmark>=4",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "setuptools>=68",
            "tensorboard>=2.18",
        ],
    },
    entry_points={"console_scripts": ["smt=smt.cli:main"]},
)
