"""Makes the table of Python packages in LICENSES.md from the lock files and the installed metadata.

`make licenses`. A locked package that is not installed here (another platform's, or a build tool's) keeps the line
that LICENSES.md has for it if its version is the same; else it is named and the run fails, for someone to look.
"""

import importlib.metadata
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- packages: made by `make licenses` -->\n", "<!-- end of packages -->\n"
NAMES = {
    "Apache Software License": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "MIT License": "MIT",
    "MPL 2.0": "MPL-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}


def locked(path: str) -> dict[str, str]:
    """Name and version of each package in a lock file."""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==([^ ]+)", (ROOT / path).read_text(), re.MULTILINE))


def license_of(name: str, version: str) -> str | None:
    try:
        found = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    if found["Version"] != version:
        return None
    classifiers = [c.rpartition(" :: ")[2] for c in found.get_all("Classifier", []) if c.startswith("License ::")]
    for text in (found["License-Expression"], found["License"], *classifiers):
        if text and len(text) < 60:
            return NAMES.get(text, text)
    return None


def main() -> None:
    page = (ROOT / "LICENSES.md").read_text()
    before, _, rest = page.partition(BEGIN)
    table, _, after = rest.partition(END)
    kept = {(m[0], m[1]): m[2] for m in re.findall(r"^\| ([^ |]+) \| ([^ |]+) \| ([^|]+) \|", table, re.MULTILINE)}
    run, dev, tools = locked("requirements.lock"), locked("requirements-dev.lock"), locked("tests/runtimes/tools.lock")
    lines, unknown = ["| package | version | licence | needed to |\n", "|---|---|---|---|\n"], []
    for name, version in sorted({*run.items(), *dev.items(), *tools.items()}):
        uses = [
            use
            for use, lock in (("run", run), ("test, check", dev), ("build llama.cpp", tools))
            if lock.get(name) == version
        ]
        if "run" in uses:
            uses = ["run" if name != "setuptools" else "install"]
        found = license_of(name, version) or kept.get((name, version), "?").strip().replace("?", "")
        if not found:
            unknown.append(f"{name} {version}")
        lines.append(f"| {name} | {version} | {found or '?'} | {', '.join(uses)} |\n")
    (ROOT / "LICENSES.md").write_text(before + BEGIN + "".join(lines) + END + after)
    if unknown:
        sys.exit("no licence in the metadata, fill it in by hand: " + ", ".join(unknown))


if __name__ == "__main__":
    main()
