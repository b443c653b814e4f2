#!/usr/bin/env bash
# Makes requirements.lock (run, with tokens) and requirements-dev.lock (run, test, check) from setup.cfg and pyproject.toml.
# Takes uv from PATH, or installs it for this one run. Arguments go to uv: --upgrade, --upgrade-package NAME.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
uv=$(command -v uv) || {
    python3 -m venv "$work/venv"
    "$work/venv/bin/python" -m pip install -q --disable-pip-version-check uv
    uv=$work/venv/bin/uv
}

# The build backend is locked too: the package itself is then installed with no index and no build isolation.
sed -n 's/^requires = \["\(.*\)"\]$/\1/p' pyproject.toml >"$work/build.in"
test -s "$work/build.in"

compile() {
    "$uv" pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
        --no-annotate "$@"
}
compile setup.cfg "$work/build.in" --extra oidc -o requirements.lock "${@}"
compile setup.cfg "$work/build.in" --extra oidc --extra test --extra check -c requirements.lock -o requirements-dev.lock "${@}"
compile tests/runtimes/tools.in -o tests/runtimes/tools.lock "${@}"
