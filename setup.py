"""Builds the C++ kernels (csrc/cpu) into a plain shared library; everything else is in pyproject.toml.

The library holds no Python and no torch code: the package loads it with ctypes and hands it raw pointers. So it is no
extension module, one build serves every Python version, and setuptools' build_ext does not fit; hence a command of our
own. Without a compiler the package still installs and works, on its PyTorch reference path. The kernels for GPUs are
Triton's, which compiles them when they are launched.

    XQUANT_BUILD_KERNELS=0   build none
    XQUANT_BUILD_KERNELS=1   a failed build fails the installation (else: one warning line)
    CXX                      the compiler, g++ if unset
    CXXFLAGS                 more options for it, behind ours
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
SOURCES = Path("csrc") / "cpu"
LIBRARY = Path("xquant_vllm") / "attention" / "cpu" / "_cpu_kernels.so"
OBJECTS = Path("build") / "kernels"

COMMON_FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra"),
]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2_FLAGS]
VNNI_FLAGS = ["-mavx512vnni", "-mavx512vbmi", *AVX512_FLAGS]
AMX_FLAGS = ["-mamx-tile", "-mamx-int8", "-mamx-bf16", "-mavx512bf16", *VNNI_FLAGS]
# Ending of a source file's stem -> what its instructions need. The order is also the order of linking, after the
# files without such an ending: of an inline function that several files define, the linker keeps the first, and that
# one must run on every processor.
ISA_FLAGS = {
    "_portable": [],
    "_avx2": AVX2_FLAGS,
    "_avx512": AVX512_FLAGS,
    "_vnni": VNNI_FLAGS,
    "_amx_emulated": VNNI_FLAGS,
    "_amx": AMX_FLAGS,
}
X86_ONLY = {"_avx2", "_avx512", "_vnni", "_amx_emulated", "_amx"}
# What a compiler may lack (GCC before 11, an old assembler): the library is then built without it.
OPTIONAL_ISA = "_amx"
OPTIONAL_CODE = (
    'void f() { asm volatile("ldtilecfg (%rax); tdpbsud %tmm2, %tmm1, %tmm0; tdpbf16ps %tmm2, %tmm1, %tmm0"); }'
)
# Only for tests, so only in a source tree: no wheel has it.
TEST_ISA = "_amx_emulated"
# These tell isa.cpp that they are there.
PRESENT_FLAGS = {OPTIONAL_ISA: "-DXQUANT_WITH_AMX", TEST_ISA: "-DXQUANT_WITH_EMULATED_AMX"}


class KernelBuildError(Exception):
    """The kernels cannot be built here; the message is what the user reads."""


def _isa_of(source: Path) -> str:
    return next((ending for ending in ISA_FLAGS if source.stem.endswith(ending)), "")


def kernel_sources() -> list[Path]:
    """The sources for this processor's architecture, in the order of linking."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    sources = [path for path in sorted((ROOT / SOURCES).glob("*.cpp")) if is_x86 or _isa_of(path) not in X86_ONLY]
    order = ["", *ISA_FLAGS]
    return sorted(sources, key=lambda path: order.index(_isa_of(path)))


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def _has_optional_isa() -> bool:
    """Whether the compiler knows the flags and its assembler the instructions of the optional instruction set."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*_compiler(), *ISA_FLAGS[OPTIONAL_ISA], "-x", "c++", "-c", "-", "-o", str(Path(folder) / "probe.o")]
        try:
            done = subprocess.run(command, input=OPTIONAL_CODE, capture_output=True, text=True, check=False)
        except OSError:
            return True  # _call tells what is wrong
    return done.returncode == 0


def _more_flags() -> list[str]:
    return shlex.split(os.environ.get("CXXFLAGS", ""))


def _call(command: list[str], what: str) -> None:
    """Run the compiler; raise with what it said if it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError as error:
        raise KernelBuildError(
            f"the compiler {command[0]!r} does not start ({error.strerror}); install g++ or set CXX"
        ) from None
    if done.stderr.strip():
        print(done.stderr.rstrip(), file=sys.stderr, flush=True)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise KernelBuildError(f"{command[0]} failed (exit code {done.returncode}) on {what}: {first}")


def _check_openmp_runtime(library: Path) -> None:
    """Refuse a library that needs another OpenMP runtime than torch's libgomp.

    The library is linked without naming a runtime, because a process must have one only. Clang's calls (__kmpc_...)
    would then find nobody, or worse, a second runtime.
    """
    if b"__kmpc_" in library.read_bytes():
        raise KernelBuildError(
            f"{' '.join(_compiler())!r} compiles OpenMP for LLVM's runtime, but torch brings GNU's; set CXX=g++"
        )


def compile_kernels(target: Path, for_tests: bool = False) -> None:
    """Compile and link the kernels to `target`, which is replaced in one step: a process may be using it.

    Args:
        target: the library.
        for_tests: also the instruction set that only tests use.
    """
    sources = [source for source in kernel_sources() if for_tests or _isa_of(source) != TEST_ISA]
    if not sources:
        raise KernelBuildError(f"no sources in {ROOT / SOURCES}; is this a complete source tree?")
    (ROOT / OBJECTS).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / OBJECTS) as folder:
        if any(_isa_of(source) == OPTIONAL_ISA for source in sources) and not _has_optional_isa():
            print(f"xquant: {_compiler()[0]} does not know AMX, building without it", flush=True)
            sources = [source for source in sources if _isa_of(source) != OPTIONAL_ISA]
        present = {PRESENT_FLAGS[_isa_of(source)] for source in sources if _isa_of(source) in PRESENT_FLAGS}
        common = [*COMMON_FLAGS, *sorted(present), f"-I{SOURCES}"]
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]

        def compile_one(source: Path, output: Path) -> None:
            name = source.relative_to(ROOT)
            print(f"xquant: compiling {name}", flush=True)
            flags = [*common, *ISA_FLAGS.get(_isa_of(source), []), *_more_flags()]
            _call([*_compiler(), *flags, "-c", str(name), "-o", str(output)], str(name))

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            list(pool.map(compile_one, sources, objects))
        linked = Path(folder) / target.name
        # No -fopenmp here: see _check_openmp_runtime.
        _call([*_compiler(), "-shared", "-o", str(linked), *map(str, objects)], target.name)
        _check_openmp_runtime(linked)
        _put(linked, target)


def _put(linked: Path, target: Path) -> None:
    """Replace a library in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    beside.write_bytes(linked.read_bytes())
    beside.chmod(0o755)
    beside.replace(target)
    print(f"xquant: built {target}", flush=True)


class build_kernels(Command):
    """Builds the library: a part of `build`, or on its own with --inplace, as `make kernels` does."""

    description = "compile csrc/cpu into a shared library"
    user_options = [("build-lib=", None, "folder of the package to be"), ("inplace", "i", "build into the source tree")]
    boolean_options = ["inplace"]
    editable_mode = False  # set by setuptools for `pip install -e`

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.inplace = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    @property
    def target(self) -> Path:
        """Where the library goes."""
        in_place = self.inplace or self.editable_mode
        return ROOT / LIBRARY if in_place else Path(str(self.build_lib)).resolve() / LIBRARY

    def run(self) -> None:
        wish = os.environ.get("XQUANT_BUILD_KERNELS", "")
        if wish not in ("", "0", "1"):
            raise SystemExit(
                f"xquant: XQUANT_BUILD_KERNELS={wish!r} means nothing; set 0 (build no kernels), "
                "1 (fail if they cannot be built), or leave it unset"
            )
        if wish == "0":
            print("xquant: XQUANT_BUILD_KERNELS=0, not building the CPU kernels", flush=True)
            if not (self.inplace or self.editable_mode):
                self.target.unlink(missing_ok=True)  # one left in build/ by an earlier run
            return
        try:
            compile_kernels(self.target, for_tests=bool(self.inplace))
        except KernelBuildError as error:
            self.target.unlink(missing_ok=True)  # one of older sources would only mislead
            if wish == "1":
                raise SystemExit(f"xquant: error: the CPU kernels were not built: {error}") from None
            print(
                f"xquant: warning: the CPU kernels were not built, the slower PyTorch path will be used: {error}",
                file=sys.stderr,
                flush=True,
            )

    # What setuptools asks every part of `build` for; see setuptools.command.build.SubCommand.
    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]

    def get_outputs(self) -> list[str]:
        return [str(self.target)] if self.target.exists() else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildWithKernels(build):
    """The usual build, then the kernels."""

    sub_commands = [*build.sub_commands, ("build_kernels", None)]


class WheelWithKernels(bdist_wheel):
    """Tags the wheel by what it holds: any Python, and this platform only if the kernels are inside."""

    def get_tag(self) -> tuple[str, str, str]:
        self.root_is_pure = not self.get_finalized_command("build_kernels").get_outputs()
        _, _, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


setup(
    cmdclass={
        "build": BuildWithKernels,
        "build_kernels": build_kernels,
        "bdist_wheel": WheelWithKernels,
    }
)
