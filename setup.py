"""Builds the kernels (csrc/cpu, csrc/cuda) into two plain shared libraries; everything else is in pyproject.toml.

The libraries hold no Python and no torch code: the package loads them with ctypes and hands them raw pointers. So they
are no extension modules, one build serves every Python version, and setuptools' build_ext does not fit; hence commands
of our own. Without a compiler the package still installs and works, on its PyTorch reference path; without nvcc, or
beside a torch without CUDA, it does without the CUDA kernels.

    XQUANT_BUILD_KERNELS=0   build no CPU kernels
    XQUANT_BUILD_KERNELS=1   a failed build fails the installation (else: one warning line)
    CXX                      the compiler, g++ if unset
    CXXFLAGS                 more options for it, behind ours
    XQUANT_BUILD_CUDA=0, 1   likewise; 1 also builds them beside a torch without CUDA
    NVCC, CUDA_HOME          where nvcc is, if it is not on the path
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
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

CUDA_SOURCES = Path("csrc") / "cuda"
CUDA_LIBRARY = Path("xquant_vllm") / "attention" / "gpu" / "cuda" / "_cuda_kernels.so"
# Machine code of Ampere, Hopper and Blackwell, and PTX that the driver compiles on what is none of these.
CUDA_TARGETS = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_100,code=sm_100",
    "-gencode=arch=compute_80,code=compute_80",
]
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", f"-I{CUDA_SOURCES}"]


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


def find_nvcc() -> str | None:
    """CUDA's compiler: ``$NVCC``, on the path, or where CUDA is usually installed."""
    usual = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    return os.environ.get("NVCC") or shutil.which("nvcc") or (str(usual) if usual.is_file() else None)


def _torch_has_cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.version.cuda is not None


def compile_cuda_kernels(target: Path) -> None:
    """Compile and link the CUDA kernels to `target`, which is replaced in one step."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise KernelBuildError("nvcc is missing; install the CUDA toolkit or set NVCC or CUDA_HOME")
    sources = sorted(path.relative_to(ROOT) for path in (ROOT / CUDA_SOURCES).rglob("*.cu"))
    if not sources:
        raise KernelBuildError(f"no sources in {ROOT / CUDA_SOURCES}; is this a complete source tree?")
    (ROOT / OBJECTS).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / OBJECTS) as folder:
        objects = [str(Path(folder) / f"{source.parent.name}_{source.stem}.o") for source in sources]

        def compile_one(source: Path, output: str) -> None:
            print(f"xquant: compiling {source}", flush=True)
            _call([nvcc, *CUDA_FLAGS, *CUDA_TARGETS, "-c", str(source), "-o", output], str(source))

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            list(pool.map(compile_one, sources, objects))
        linked = Path(folder) / target.name
        # CUDA's runtime goes into the library, whatever version of it torch has brought.
        _call([nvcc, "-shared", "-cudart=static", "-o", str(linked), *objects], target.name)
        _put(linked, target)


class KernelCommand(Command):
    """Builds one library: a part of `build`, or on its own with --inplace."""

    user_options = [("build-lib=", None, "folder of the package to be"), ("inplace", "i", "build into the source tree")]
    boolean_options = ["inplace"]
    editable_mode = False  # set by setuptools for `pip install -e`
    library: Path
    variable: str
    what: str
    instead: str

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.inplace = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def compile(self, target: Path) -> None:
        """Make the library."""
        raise NotImplementedError

    def reason_to_skip(self) -> str | None:
        """Why not even to try, if nothing was demanded."""
        return None

    @property
    def target(self) -> Path:
        """Where the library goes."""
        in_place = self.inplace or self.editable_mode
        return ROOT / self.library if in_place else Path(str(self.build_lib)).resolve() / self.library

    def run(self) -> None:
        wish = os.environ.get(self.variable, "")
        if wish not in ("", "0", "1"):
            raise SystemExit(
                f"xquant: {self.variable}={wish!r} means nothing; set 0 (build no kernels), "
                "1 (fail if they cannot be built), or leave it unset"
            )
        reason = f"{self.variable}=0" if wish == "0" else None if wish else self.reason_to_skip()
        if reason is not None:
            print(f"xquant: {reason}, not building {self.what}", flush=True)
            if not (self.inplace or self.editable_mode):
                self.target.unlink(missing_ok=True)  # one left in build/ by an earlier run
            return
        try:
            self.compile(self.target)
        except KernelBuildError as error:
            self.target.unlink(missing_ok=True)  # one of older sources would only mislead
            if wish == "1":
                raise SystemExit(f"xquant: error: {self.what} were not built: {error}") from None
            print(
                f"xquant: warning: {self.what} were not built, {self.instead} will be used: {error}",
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


class build_kernels(KernelCommand):
    """Build the CPU kernels, as `make kernels` does."""

    description = "compile csrc/cpu into a shared library"
    library, variable = LIBRARY, "XQUANT_BUILD_KERNELS"
    what, instead = "the CPU kernels", "the slower PyTorch path"

    def compile(self, target: Path) -> None:
        compile_kernels(target, for_tests=bool(self.inplace))


class build_cuda(KernelCommand):
    """Build the CUDA kernels, where they can be built and used."""

    description = "compile csrc/cuda into a shared library"
    library, variable = CUDA_LIBRARY, "XQUANT_BUILD_CUDA"
    what, instead = "the CUDA kernels", "the Triton kernels alone"

    def compile(self, target: Path) -> None:
        compile_cuda_kernels(target)

    def reason_to_skip(self) -> str | None:
        if not _torch_has_cuda():
            return "torch has no CUDA here"
        return "nvcc is missing" if find_nvcc() is None else None


class BuildWithKernels(build):
    """The usual build, then the kernels."""

    sub_commands = [*build.sub_commands, ("build_kernels", None), ("build_cuda", None)]


class WheelWithKernels(bdist_wheel):
    """Tags the wheel by what it holds: any Python, and this platform only if the kernels are inside."""

    def get_tag(self) -> tuple[str, str, str]:
        commands = [self.get_finalized_command(name) for name in ("build_kernels", "build_cuda")]
        self.root_is_pure = not any(command.get_outputs() for command in commands)
        _, _, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


setup(
    cmdclass={
        "build": BuildWithKernels,
        "build_kernels": build_kernels,
        "build_cuda": build_cuda,
        "bdist_wheel": WheelWithKernels,
    }
)
