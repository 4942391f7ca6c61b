"""The part of the build that pyproject.toml cannot say: a wheel carries ds_configs/ inside the package."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SOURCE = Path("ds_configs")  # builds run in the folder of this file


class BuildWithDeepSpeedConfigs(build_py):
    """Copies ds_configs/ into vitfreeze/; an editable install reads those of the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in self._pairs():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, *(target for _, target in self._pairs())]

    def _pairs(self) -> list[tuple[str, str]]:
        folder = Path(self.build_lib) / "vitfreeze" / SOURCE
        return [(str(path), str(folder / path.name)) for path in sorted(SOURCE.glob("*.json"))]


setup(cmdclass={"build_py": BuildWithDeepSpeedConfigs})
