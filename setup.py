"""Lists the packages, and maps two folders at the top of the repository into the package; pyproject.toml cannot say both."""

from setuptools import find_packages, setup

DATA = {"instructblip.configs": "configs", "instructblip.datasets": "datasets"}  # files.shipped finds them there

setup(
    packages=[*find_packages(include=["instructblip*"]), *DATA],
    package_dir=DATA,
    package_data={
        "instructblip": ["**/*.jinja", "**/*.css", "**/*.json"],
        **{name: ["**/*.yaml", "*.md"] for name in DATA},
    },
    include_package_data=False,
)
