"""Compiles the C parts, if there is a compiler; all else is in pyproject.toml.

They are the decoder layers on CPUs and the router's search. Both are optional: where they cannot be
compiled the installation goes on, a warning shows at `pip install -v`, and PyTorch and numpy do
their work (see kernels/native.py, router/native.py). They are declared here because in strict
editable installs setuptools expects the file of an optional extension even when compiling it
failed; the command below forgets it then, and removes one that an older source left behind.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildOptional(build_ext):
    """`build_ext` that only speaks of files that exist."""

    def run(self) -> None:
        super().run()
        if self.inplace:
            for built, placed in super().get_output_mapping().items():
                if not Path(built).exists():
                    Path(placed).unlink(missing_ok=True)

    def get_output_mapping(self) -> dict[str, str]:
        mapping = super().get_output_mapping()
        return {built: placed for built, placed in mapping.items() if Path(placed).exists()}


LAYERS = Extension(
    "hexswarm.kernels._native",
    sources=["kernels/native.c"],
    depends=[  # also puts them into the source distribution
        *("kernels/native_layers.h", "kernels/native_tiles.h"),
    ],
    extra_compile_args=[
        *("-std=c11", "-O3", "-g0", "-pthread"),
        *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    ],
    extra_link_args=["-pthread"],
    optional=True,
)

ROUTER = Extension(
    "hexswarm.router._native",
    sources=["router/native.c"],
    depends=[
        *(f"router/native_{part}.h" for part in ("tables", "boxes", "search", "select")),
        *(f"router/native_{part}.h" for part in ("flow", "anneal", "latency")),
    ],
    extra_compile_args=["-std=c11", "-O3", "-g0", "-fno-trapping-math"],
    optional=True,
)

setup(ext_modules=[LAYERS, ROUTER], cmdclass={"build_ext": BuildOptional})
