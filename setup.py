"""The one build decision that pyproject.toml cannot express: which C API the module is built on.

The stable ABI makes one wheel for CPython 3.11 and newer. Free-threaded builds do not have it yet,
so there the module is built for exactly that interpreter.
"""

import sysconfig
from pathlib import Path

from setuptools import Extension, setup

# No optimisation level: it is the interpreter's, unless CFLAGS says otherwise, as for sanitizers.
# Not -Wpedantic: it refuses functions in a PyType_Slot, whose pointer is void*; POSIX allows it.
COMPILE_ARGS = [
    "-std=c11",
    "-Wall",
    "-Wextra",
    "-Wconversion",
    "-Wshadow",
    "-Wstrict-prototypes",
    "-Werror=implicit-function-declaration",
    "-Werror=incompatible-pointer-types",
    "-fvisibility=hidden",
]

STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")

NATIVE = Path("shmepoch/native")

setup(
    ext_modules=[
        Extension(
            "shmepoch._native",
            sorted(str(path) for path in NATIVE.glob("*.c")),
            depends=sorted(str(path) for path in NATIVE.glob("*.h")),
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if STABLE_ABI else [],
            extra_compile_args=COMPILE_ARGS,
            py_limited_api=STABLE_ABI,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE_ABI else {},
)
