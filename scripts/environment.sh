# Sourced by the scripts beside it: an environment of the checkout's own, installed once for each state of its pins.
#
#   prepare_environment [EXTRA]     creates .venv, installs diffaccel[EXTRA] editable under scripts/constraints.txt

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
