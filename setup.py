"""Writes into wheels and sdists the commit that they are built from; all else is in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
VERSION = runpy.run_path(str(ROOT / "moeport/version.py"))


def write_commit(root: Path) -> None:
    """Write the commit of this checkout below `root`; in an sdist, which is no checkout, the file is there already."""
    found = VERSION["of_checkout"](ROOT)
    if found:
        (root / "moeport" / VERSION["COMMIT_FILE"]).write_text(found + "\n", encoding="utf-8")


class BuildPy(build_py):
    """Copies the package into a wheel."""

    def run(self) -> None:
        """As the base class, then the commit; an editable install asks git each time."""
        super().run()
        if not self.editable_mode:
            write_commit(Path(self.build_lib))


class Sdist(sdist):
    """Makes an sdist."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """As the base class, then the commit."""
        super().make_release_tree(base_dir, files)
        write_commit(Path(base_dir))


setup(cmdclass={"build_py": BuildPy, "sdist": Sdist})
