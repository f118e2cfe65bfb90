"""Install fairseq_dsq: ``pip install .`` or ``pip install -e '.[dev]'``."""

import os
import platform
import sys
import sysconfig
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent

# ve-fairseq (upstream's sources with its dataclass defaults fixed for Python 3.11) has wheels for these alone.
LINUX_X86 = "sys_platform == 'linux' and platform_machine == 'x86_64'"
HAS_WHEEL = f"{LINUX_X86} and python_version >= '3.11' and python_version < '3.13'"
NO_WHEEL = "(sys_platform != 'linux' or platform_machine != 'x86_64' or python_version >= '3.13')"

SHIM = '''"""An editable install: this stands where fairseq looks for --user-dir, and points to the clone."""

__path__ = [{package!r}]
__file__ = {init!r}
with open(__file__, encoding="utf-8") as _file:
    exec(compile(_file.read(), __file__, "exec"))
'''


class EditableWheel(editable_wheel):
    """An editable install that ``--user-dir fairseq_dsq`` finds from any directory, as it finds a plain one."""

    def run(self) -> None:
        package = ROOT / "fairseq_dsq"
        shim = ROOT / "build" / "editable" / "fairseq_dsq" / "__init__.py"
        shim.parent.mkdir(parents=True, exist_ok=True)
        shim.write_text(SHIM.format(package=str(package), init=str(package / "__init__.py")), encoding="utf-8")
        site_packages = os.path.relpath(sysconfig.get_path("purelib"), sys.prefix)
        files = [(os.path.join(site_packages, "fairseq_dsq"), [os.path.relpath(shim, ROOT)])]
        self.distribution.data_files = [*(self.distribution.data_files or []), *files]
        self.distribution.has_data = lambda: True  # what this command asks before it installs data_files
        super().run()


NATIVE = Path("fairseq_dsq", "kernels", "native")
SOURCES = sorted(path.relative_to(ROOT) for pattern in ("*.cpp", "*.h") for path in (ROOT / NATIVE).glob(pattern))
# All but cpu.cpp are compiled once per instruction set; native/__init__.py takes the best that the CPU runs.
INSTRUCTION_SETS = {"baseline": []}
PER_SET = ("quantize.cpp", "rows.cpp", "adam.cpp", "masks.cpp")
# What gemm.cpp wants besides; with a compiler that does not know it, the set has no GEMM.
GEMM_FLAGS = {}
# Of gemm_amx.cpp; without tiles there is their emulation alone, without AVX-512 nothing.
AMX_FLAGS: list[list[str]] = []
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["baseline"] = ["-O1"]  # CPUs of before 2013: compiled in half the time
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
    GEMM_FLAGS = {"avx512": ["-mfma", "-mavx512vnni", "-mavx512bf16"]}
    emulation = [*INSTRUCTION_SETS["avx512"], "-mfma"]
    AMX_FLAGS = [[*emulation, "-mamx-tile", "-mamx-bf16"], emulation]
# Results must equal torch's bit for bit: no fused multiply-add, no fast math.
FLAGS = ["-std=c++17", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"]
if " -O" not in " " + os.environ.get("CXXFLAGS", ""):
    FLAGS.append("-O3")
# GCC says so of the vectors' own operations, and of its own headers.
FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-warning-option"]


class BuildKernels(build_ext):
    """Builds the CPU kernels, which the package can do without: a plain C library, loaded through ctypes."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # not Python's suffix: any Python loads it

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext, ["-fopenmp"])
        except Exception:
            try:
                self._build(ext, [])  # a compiler without OpenMP: one thread
            except Exception as error:
                reason = str(error).strip().splitlines()[0][:100]
                self.warn(f"no CPU kernels, quantization will run in plain, slow torch: {reason}")

    def _build(self, ext: Extension, openmp: list[str]) -> None:
        number = zlib.crc32(b"".join((ROOT / source).read_bytes() for source in SOURCES))
        flags = [*FLAGS, *openmp, f"-DDSQ_SOURCE={number}u"]
        # (source, folder of its object file, flags of which the compiler takes the first that it knows)
        jobs = []
        for isa, isa_flags in reversed(INSTRUCTION_SETS.items()):
            plain = [*flags, f"-DDSQ_ISA={isa}"]
            jobs += [(source, isa, [[*plain, *isa_flags]]) for source in PER_SET]
            jobs.append(("gemm.cpp", isa, [[*plain, *isa_flags, *GEMM_FLAGS.get(isa, [])], plain]))
        jobs.append(("gemm_amx.cpp", "amx", [*([*flags, *more] for more in AMX_FLAGS), flags]))
        jobs.append(("cpu.cpp", "cpu", [flags]))
        jobs.sort(key=lambda job: job[0] != "quantize.cpp")  # which takes nearly all of the time
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            objects = [path for paths in threads.map(lambda job: self._compile_first(*job), jobs) for path in paths]
        library = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, library, extra_postargs=openmp, target_lang="c++")

    def _compile_first(self, source: str, folder: str, choices: list[list[str]]) -> list[str]:
        """With the first flags that the compiler knows."""
        for flags in choices[:-1]:
            try:
                return self._compile(source, folder, flags)
            except Exception:
                continue
        return self._compile(source, folder, choices[-1])

    def _compile(self, source: str, folder: str, flags: list[str]) -> list[str]:
        output_dir = os.path.join(self.build_temp, folder)
        return self.compiler.compile([str(NATIVE / source)], output_dir=output_dir, extra_postargs=flags)


setup(
    name="fairseq_dsq",
    version="0.1.0",
    description="Dynamic Stashing Quantization for fairseq: low-precision Transformer training with a packed stash",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    # configs/ stands at the top of a clone and inside an installed package.
    packages=[*find_packages(include=["fairseq_dsq", "fairseq_dsq.*"]), "fairseq_dsq.configs"],
    package_dir={"fairseq_dsq.configs": "configs"},
    package_data={
        "fairseq_dsq": ["py.typed"],
        "fairseq_dsq.configs": ["**/*.yaml"],
        "fairseq_dsq.kernels.native": ["*.cpp", "*.h"],
        "fairseq_dsq.report": ["*.jinja"],
    },
    ext_modules=[
        Extension(
            "fairseq_dsq.kernels.native._kernels",
            [str(source) for source in SOURCES if source.suffix == ".cpp"],
            depends=[str(source) for source in SOURCES],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "editable_wheel": EditableWheel},
    install_requires=[
        "torch>=2.6",
        f"ve-fairseq==0.12.3; {HAS_WHEEL}",
        f"fairseq-fixed==0.12.3.1; python_version >= '3.11' and {NO_WHEEL}",
        "fairseq==0.12.2; python_version < '3.11'",
        "sacrebleu>=2.0",
        "sentencepiece>=0.1.96",
        "tabulate>=0.8.9",
        "numpy>=1.24",
    ],
    extras_require={
        "dev": [
            "pytest",
            "pytest-xdist>=3.8",
            "hypothesis",
            "gfloat",
            "ruff",
            "mypy",
            "qtorch",
            "selenium",
            "matplotlib",
            "jinja2",
            "tensorboard",
            "tensorboardX",
            "transformers",
            "safetensors",
            "sacremoses",
            "subword-nmt",
            # To test the CUDA kernels without a GPU.
            "triton; platform_system == 'Linux' and platform_machine == 'x86_64'",
        ],
        "report": ["matplotlib", "jinja2"],
        "translation": ["sacremoses", "subword-nmt"],
        "glue": ["tokenizers", "safetensors", "scikit-learn", "scipy"],
    },
    entry_points={"console_scripts": ["fairseq-dsq = fairseq_dsq.cli:main"]},
)
