"""Put the top-level folders configs/ and launch/ into wheels, as btlm_jax/configs and btlm_jax/launch.

Everything else about the package is in setup.cfg. An editable installation and a checkout find the folders where they
are (btlm_jax/cli/parse.py).
"""

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("configs", "launch")


class BuildWithFolders(build_py):
    """Copy the folders beside the package's modules, unless the installation is editable."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for folder in FOLDERS:
                self.copy_tree(folder, f"{self.build_lib}/btlm_jax/{folder}")


setup(cmdclass={"build_py": BuildWithFolders})
