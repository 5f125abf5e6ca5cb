# Sourced by the scripts beside it: an environment of the checkout's own, installed once for each state of its pins.
#
#   prepare_environment [EXTRA]     creates .venv, installs diffaccel[EXTRA] editable under scripts/constraints.txt
#   prepare_browser                 Chromium and its driver, for tests of pages

prepare_environment() {
    local extra="${1:-}" python="${PYTHON:-python3}" venv="$root/.venv" stamp wanted
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "diffaccel needs Python 3.11 or newer, $python is $("$python" --version 2>&1); set PYTHON=..." >&2
        exit 2
    }
    stamp="$venv/.diffaccel-ready${extra:+-$extra}"
    wanted=$(cat "$root/pyproject.toml" "$root/scripts/constraints.txt" | cksum)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        echo "environment: $venv (ready)"
    else
        echo "environment: $venv (installing pinned versions, a few minutes the first time)"
        [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
        # torch first and alone: the resolver then keeps the build that this machine's pip is set up to give
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            "$(grep '^torch==' "$root/scripts/constraints.txt")"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            --constraint "$root/scripts/constraints.txt" --editable "$root${extra:+[$extra]}"
        echo "$wanted" > "$stamp"
    fi
    PATH="$venv/bin:$PATH"
    unset PYTHONPATH
}

# Pages are tested in a real browser: Chromium and its driver are installed where apt can do it, and tests that need
# them are skipped where it cannot.
prepare_browser() {
    local as_root=()
    command -v chromedriver > /dev/null && return
    [ "$(id -u)" = 0 ] || as_root=(sudo -n)
    if command -v apt-get > /dev/null && "${as_root[@]}" true 2> /dev/null; then
        echo "browser: installing chromium"
        as_root+=(env DEBIAN_FRONTEND=noninteractive)
        "${as_root[@]}" apt-get -qq update && "${as_root[@]}" apt-get -qq install -y chromium chromium-driver > /dev/null &&
            return
    fi
    echo "browser: there is no chromium here and apt cannot install it; tests of pages are skipped" >&2
}
