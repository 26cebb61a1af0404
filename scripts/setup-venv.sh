#!/bin/sh
# Makes .venv with netstack (editable) and all that its development needs. `make setup` calls it when pyproject.toml or
# scripts/constraints.txt is newer than the environment. PYTHON=... chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# The distribution's Python first: it is built with profile-guided optimisation, which pyenv and plain `./configure` leave
# out, and netstack runs 10 to 45 % faster on it (measured). One that cannot make environments is taken only when no other can.
find_python() {
    spare=
    for candidate in ${PYTHON:-} /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null 2>&1 && is_new_enough "$candidate"; then
            spare=${spare:-$candidate}
            if [ "$(id -u)" = 0 ] || "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
                command -v "$candidate"
                return
            fi
        fi
    done
    if [ -n "$spare" ]; then
        command -v "$spare"
        return
    fi
    say "netstack needs Python 3.11 or newer; found: $(python3 --version 2>&1 || true)."
    say "Install one (Debian 12, Ubuntu 24.04: apt-get install python3 python3-venv; Ubuntu 22.04: apt-get install" \
        "python3.11 python3.11-venv), or name it: make setup PYTHON=/path/to/python3.12"
    exit 1
}

# Debian keeps ensurepip, without which a virtual environment has no pip, in a package of its own.
need_ensurepip() {
    "$1" -c 'import ensurepip, venv' 2>/dev/null && return
    package=$("$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "installing $package"
        export DEBIAN_FRONTEND=noninteractive
        mkdir -p .cache
        {
            apt-get install -yqq --no-install-recommends "$package" ||
                { apt-get update -qq && apt-get install -yqq --no-install-recommends "$package"; } || true
        } </dev/null >.cache/setup-venv.log 2>&1
        "$1" -c 'import ensurepip, venv' 2>/dev/null && return
    fi
    say "$1 cannot make virtual environments: it has no ensurepip. As root: apt-get install $package"
    exit 1
}

if [ -x .venv/bin/python ] && is_new_enough .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; then
    [ -z "${PYTHON:-}" ] || say "keeping the Python of .venv ($(.venv/bin/python --version)); \`make distclean\` first to change it"
else
    python=$(find_python)
    need_ensurepip "$python"
    say "making .venv with $("$python" --version) ($python)"
    rm -rf .venv
    "$python" -m venv .venv
fi

say "installing the Python packages into .venv"
if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt \
    --editable '.[dev,bench]'; then
    say "pip could not install the packages: the lines above say which, and why (no way to the package index?)."
    exit 1
fi
# Written last: an interrupted set-up is done again.
touch .venv/.ready
