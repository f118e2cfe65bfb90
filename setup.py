"""Install fairseq_dsq: ``pip install .`` or ``pip install -e '.[dev]'``."""

from pathlib import Path

from setuptools import find_packages, setup

# ve-fairseq (upstream's sources with its dataclass defaults fixed for Python 3.11) has wheels for these alone.
HAS_WHEEL = "sys_platform == 'linux' and platform_machine == 'x86_64' and python_version >= '3.11' and python_version < '3.13'"
NO_WHEEL = "(sys_platform != 'linux' or platform_machine != 'x86_64' or python_version >= '3.13')"

setup(
    name="fairseq_dsq",
    version="0.1.0",
    description="Dynamic Stashing Quantization for fairseq: low-precision Transformer training with a packed stash",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["fairseq_dsq", "fairseq_dsq.*"]),
    package_data={"fairseq_dsq": ["py.typed"]},
    install_requires=[
        "torch>=2.6",
        f"ve-fairseq==0.12.3; {HAS_WHEEL}",
        f"fairseq-fixed==0.12.3.1; python_version >= '3.11' and {NO_WHEEL}",
        "fairseq==0.12.2; python_version < '3.11'",
        "sacrebleu>=2.0",
        "sentencepiece>=0.1.96",
        "numpy>=1.24",
    ],
    extras_require={
        "dev": ["pytest", "hypothesis", "ruff", "mypy", "qtorch", "tensorboardX"],
        "report": ["matplotlib", "jinja2", "tensorboard", "tensorboardX"],
        "glue": ["transformers", "safetensors", "scikit-learn", "scipy"],
    },
    entry_points={"console_scripts": ["fairseq-dsq = fairseq_dsq.cli:main"]},
)
