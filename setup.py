"""Installs crystal: `pip install --no-build-isolation -e .` (or `make setup`, which also makes the environment)."""
from setuptools import setup

setup(
    name="crystal",
    version="0.1.0",
    description="The readable, tested reference of visual latent reasoning: CrystaL and its relatives",
    license="MIT",
    python_requires=">=3.11",
    packages=["crystal", "crystal.methods", "data_prep"],
    package_data={"crystal": ["assets/*/*"]},
    install_requires=["torch>=2.10", "transformers>=5.17,<6", "safetensors", "numpy", "pillow", "tqdm", "ninja"],
    extras_require={
        "plots": ["matplotlib"],
        "track": ["tensorboard"],
        "serve": ["starlette", "uvicorn", "pydantic"],
        "data": ["pyarrow"],
        "test": ["pytest", "peft", "scikit-image", "scipy", "matplotlib", "openai", "pyarrow", "starlette", "uvicorn", "pydantic"],
    },
)
