#!/bin/bash
# Carries the binary and the tests of ZFS into the test machine, built on this one, and runs job.sh there. `./test vm` calls it.
#
#   lane.sh CARGO_FLAG...
#   lane.sh --is-there        succeeds where no machine would have to be built
#
# The flags are those of the build, so that nothing is built twice. Exit status: that of job.sh; 124 after the time-out.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."

# The tests that are carried: the names of their executables.
suites=(conformance zfs e2e)
limit_seconds=1500
cache=$PWD/.cache/vm
packed=../shared/zfsvm/image

is_unpacked() { [[ -e $cache/vmlinux && -e $cache/initrd.cpio ]]; }

# The machine, unpacked: the one that is there, else a ready-made image beside the project, else a new one.
machine() {
    is_unpacked && return
    mkdir -p "$cache"
    local file
    if [[ -e $packed/initrd.cpio.zst ]]; then
        for file in vmlinux initrd.cpio; do
            zstd -dqf "$packed/$file.zst" -o "$cache/$file.new"
            mv "$cache/$file.new" "$cache/$file"
        done
    else
        echo "there is no machine yet: building one (ten minutes or more)"
        "$here/build.sh" "$cache"
    fi
}

# Copies a program without its debug information, and the libraries that it is linked with.
carry() {
    local from=$1 to=$2 library
    strip -o "$to" "$from"
    ldd "$from" | grep -o '/[^ ]*' | while read -r library; do
        [[ -e $share/libraries$library ]] || install -D "$(readlink -e "$library")" "$share/libraries$library"
    done
}

# Prints the name and the path of each test executable.
executables() {
    cargo test --no-run --quiet --message-format=json "$@" |
        sed -n 's/.*"kind":\["test"\].*"name":"\([^"]*\)","src_path".*"executable":"\([^"]*\)".*/\1 \2/p'
}

if [[ ${1:-} == --is-there ]]; then
    is_unpacked || [[ -e $packed/initrd.cpio.zst ]]
    exit
fi
machine
share=$(mktemp -d)
trap 'rm -rf "$share"' EXIT
mkdir -p "$share/bin" "$share/tools"
# Into a variable first: a build that fails ends the lane.
built=$(executables "$@")
while read -r name path; do
    for suite in "${suites[@]}"; do
        [[ $name == "$suite" ]] || continue
        carry "$path" "$share/bin/$name"
        # The binary under test lies above the tests of its build.
        [[ $name != e2e ]] || carry "$(dirname "$(dirname "$path")")/flocker" "$share/bin/flocker"
    done
done <<<"$built"
for suite in "${suites[@]}"; do
    [[ -e $share/bin/$suite ]] || { echo "there is no test executable $suite" >&2; exit 1; }
done
# Busybox's one knows no --pdeathsig.
carry "$(command -v setpriv)" "$share/tools/setpriv"
cp "$here/job.sh" "$share/"
[[ -z ${FLOCKER_VM_FILTER:-} ]] || echo "$FLOCKER_VM_FILTER" >"$share/filter"

processors=$(nproc)
"$here/run.sh" -c $((processors < 4 ? processors : 4)) -t "$limit_seconds" -m 3072 -d 4G -d 4G -d 256M "$cache" "$share"
