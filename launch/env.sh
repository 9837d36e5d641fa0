# Sourced by the launch scripts: makes a virtual environment once and again when its requirements change.
# pip's own environment variables (an index, a proxy, a folder of wheels) apply as usual.

# Many container images set it; every process would then compile all of torch that it imports, seconds each time
unset PYTHONDONTWRITEBYTECODE

# environment FOLDER [--no-deps] REQUIREMENTS...      --no-deps: the files name every package
environment() {
  local folder=$1 stamp options=()
  shift
  if [ "$1" = --no-deps ]; then
    options=(--no-deps)
    shift
  fi
  stamp="$folder/.made-from-$(cat "$@" pyproject.toml | sha256sum | cut -c1-16)"
  [ -e "$stamp" ] && return
  local python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed, $python is $("$python" -V 2>&1); set PYTHON to another one" >&2
    exit 2
  }
  echo "making $folder (once, a minute or two) ..."
  rm -f "$folder"/.made-from-*
  "$python" -m venv "$folder"
  local files=()
  for file in "$@"; do files+=(-r "$file"); done
  # Python compiles the few modules that are used when they are; compiling all of torch would take pip long
  "$folder/bin/pip" install --quiet --disable-pip-version-check --no-compile "${options[@]}" "${files[@]}"
  "$folder/bin/pip" install --quiet --disable-pip-version-check --no-deps --editable .
  touch "$stamp"
}
