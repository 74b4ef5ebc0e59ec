# Sourced by quickstart.sh and test.sh: makes a virtual environment with hf-geta in it, or takes the one there is.
#
#   make_venv DIRECTORY EXTRAS      afterwards $PYTHON is its interpreter
#
# Torch comes first, because its wheels differ by machine. On Linux without an NVIDIA GPU it is the CPU build of a
# tested version; everywhere else pip chooses. Environment variables:
#   HF_GETA_PYTHON        interpreter that makes the environment   (python3)
#   HF_GETA_TORCH         requirement for torch                    (torch==2.13.0, or torch>=2.11 where pip chooses)
#   HF_GETA_TORCH_INDEX   index of the torch wheels. Unset: the one that pip is configured with when it has the CPU
#                         build, otherwise PyTorch's own CPU index. Empty: always the one pip is configured with.

pytorch_cpu_index="https://download.pytorch.org/whl/cpu"

install_torch() {
    local requirement="${HF_GETA_TORCH:-torch>=2.11}"
    if [ -n "${HF_GETA_TORCH_INDEX:-}" ]; then
        "$PYTHON" -m pip install --quiet --index-url "$HF_GETA_TORCH_INDEX" "$requirement"
    elif [ "$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then
        requirement="${HF_GETA_TORCH:-torch==2.13.0}"
        if [ -n "${HF_GETA_TORCH_INDEX+set}" ] || cpu_build_is_configured "$requirement"; then
            "$PYTHON" -m pip install --quiet "$requirement"
        else
            "$PYTHON" -m pip install --quiet --index-url "$pytorch_cpu_index" "$requirement"
        fi
    else
        "$PYTHON" -m pip install --quiet "$requirement"
    fi
}

cpu_build_is_configured() {
    "$PYTHON" -m pip install --quiet --dry-run --no-deps --report - "$1" 2>/dev/null | grep -q '"version": "[^"]*+cpu"'
}

make_venv() {
    local directory="$1" extras="$2" stamp
    stamp="$directory/.hf_geta_$(printf '%s' "$extras" | tr ',' '_')"
    PYTHON="$directory/bin/python"
    if [ -f "$stamp" ] && cmp -s pyproject.toml "$stamp" && [ -x "$PYTHON" ]; then
        return
    fi
    echo "Installing hf-geta into $directory (once; a few minutes) ..."
    rm -f "$stamp"
    if [ ! -x "$PYTHON" ]; then
        "${HF_GETA_PYTHON:-python3}" -c 'import sys; sys.exit("hf-geta needs Python 3.11 or newer; set HF_GETA_PYTHON to one" if sys.version_info < (3, 11) else 0)'
        "${HF_GETA_PYTHON:-python3}" -m venv "$directory"
    fi
    install_torch
    "$PYTHON" -m pip install --quiet --editable ".[$extras]"
    cp pyproject.toml "$stamp"
}
