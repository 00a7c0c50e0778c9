#!/usr/bin/env bash
# Make the virtual environment with locked versions and see to the OpenGL library. Usage: make_env.sh DIRECTORY
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1

fail() { printf 'make env: %s\n' "$*" >&2; exit 1; }

# Install a system package where that needs no password; otherwise say what to do.
system_package() {
    local package=$1 reason=$2 sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo -n)
    if ! command -v apt-get >/dev/null || { [ ${#sudo[@]} -gt 0 ] && ! sudo -n true 2>/dev/null; }; then
        fail "$reason. Install it first: sudo apt-get install $package (Debian, Ubuntu; elsewhere its like)"
    fi
    printf 'make env: %s: installing %s\n' "$reason" "$package"
    "${sudo[@]}" apt-get update -q >/dev/null || true # an old index is still worth a try
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$package" >/dev/null ||
        fail "apt-get install $package failed"
}

find_python() {
    local candidate
    for candidate in python3.12 python3.11 python3.10 python3; do
        # Run it: a name on the PATH may be a stub of a version manager.
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.10, 3.11 or 3.12 found; install one: sudo apt-get install python3 python3-venv"
}

loads_library() { "$venv/bin/python" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$1" 2>/dev/null; }

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        system_package "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" \
            "$python has no venv module"
    "$python" -m venv --clear "$venv"
fi
"$venv/bin/python" -m pip install --quiet --constraint requirements.lock --editable '.[dev]'

# robosuite imports OpenCV, which wants these two even where no window is ever opened.
"$venv/bin/python" -c 'import cv2' 2>/dev/null || {
    loads_library libGL.so.1 || system_package libgl1 "OpenCV misses libGL.so.1"
    loads_library libgthread-2.0.so.0 || system_package libglib2.0-0 "OpenCV misses libgthread-2.0.so.0"
}
# EGL draws where an NVIDIA driver works, OSMesa everywhere else.
backend() { "$venv/bin/python" -c 'from rsd.sim.rendering import gl_backend; print(gl_backend())'; }
backend >/dev/null 2>&1 || system_package libosmesa6 "the simulator's cameras need OSMesa"
"$venv/bin/python" -c 'import cv2' || fail "OpenCV does not import; its message is above"
printf 'make env: OpenGL through %s\n' "$(backend)"
