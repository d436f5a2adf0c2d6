"""What setup.cfg cannot say: the folders configs/ and launch/ go into wheels, and kernels built ahead make them binary.

An editable installation and a checkout find the folders where they are (btlm_jax/cli/parse.py).
"""

from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

FOLDERS = ("configs", "launch")
HAS_KERNELS = any(Path("btlm_jax/kernels/prebuilt").glob("*.so"))  # from btlm build-kernels


class BuildWithFolders(build_py):
    """Copy the folders into the package, unless the installation is editable."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for folder in FOLDERS:
                self.copy_tree(folder, f"{self.build_lib}/btlm_jax/{folder}")


class DistributionOfPlatform(Distribution):
    """Say that there is compiled code, if there is, though not setuptools compiled it."""

    def has_ext_modules(self):
        return HAS_KERNELS


class WheelOfPlatform(bdist_wheel):
    """Tag a wheel that carries compiled kernels for its platform; any Python may load them."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if HAS_KERNELS else (python, abi, platform)


setup(distclass=DistributionOfPlatform, cmdclass={"build_py": BuildWithFolders, "bdist_wheel": WheelOfPlatform})
