"""The places of the packages. All else is in pyproject.toml, which cannot add the configurations as packages."""

from setuptools import find_packages, setup

SHIPPED = {
    f"t3d.{name}": name for name in ("configs", "accelerate_configs")
}  # next to t3d/ in the checkout, inside it in the wheel

setup(
    packages=[*find_packages(include=["t3d", "t3d.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data=dict.fromkeys(SHIPPED, ["**/*.yaml"])
    | dict.fromkeys(("t3d.evaluation", "t3d.share"), ["*.j2"])
    | {"t3d.cli.playground": ["page.*"], "t3d.evaluation": ["report.*"]},
)
