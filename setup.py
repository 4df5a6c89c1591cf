"""Builds the kernels' library into the package where there is a C++ compiler, and installs without it elsewhere."""

import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
BUILD = runpy.run_path(str(HERE / "runtime" / "kernels" / "build.py"))


class Kernels(build_ext):
    """The one extension is not Python's: a plain shared library beside its sources."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], BUILD["LIBRARY"]))

    def build_extension(self, extension: Extension) -> None:
        out = Path(self.get_ext_fullpath(extension.name))
        try:
            BUILD["build"](out)
        except BUILD["BuildError"] as error:
            out.unlink(missing_ok=True)  # what an earlier build left
            self.distribution.ext_modules = []
            print(f"warning: shoal's kernels were not built, ONNX Runtime's will be used: {error}", file=sys.stderr)


class Wheel(bdist_wheel):
    """For this platform but any Python, as the library has a C interface; for any platform without the library."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "any" if self.root_is_pure else super().get_tag()[2])


def files(*suffixes: str) -> list[str]:
    return [str(path.relative_to(HERE)) for suffix in suffixes for path in BUILD["HERE"].glob(f"*.{suffix}")]


setup(
    ext_modules=[Extension("shoal.runtime.kernels.libshoal_kernels", files("cpp"), depends=files("h", "inl"))],
    cmdclass={"build_ext": Kernels, "bdist_wheel": Wheel},
)
