#!/bin/bash
# What runs inside the test machine: the ZFS tests, on the OpenZFS of its kernel. lane.sh carries it there with `bin`.
set -u

# The machine's C library may be older than the one that the tests were linked with here; then that one takes its place.
overwrite=no
bin/flocker --version >/dev/null 2>&1 || overwrite=yes
(cd libraries && find . -type f) | while read -r library; do
    if [[ $overwrite == yes || ! -e /$library ]]; then
        mkdir -p "/${library%/*}"
        cp "libraries/$library" "/$library.new"
        mv "/$library.new" "/$library"
    fi
done
export PATH=$PWD/tools:$PATH
# The kernel mounts snapshots below .zfs through it.
[[ -e /usr/bin/env ]] || ln -s /bin/busybox /usr/bin/env

# Two tests that want one of them at once would race for it.
modprobe -a veth sch_netem
for pool in left=/dev/vdb right=/dev/vdc; do
    zpool create -O mountpoint=none "${pool%%=*}" "${pool#*=}" || exit 100
done

export FLOCKER_REQUIRE=openzfs,setpriv FLOCKER_TEST_BINARY=$PWD/bin/flocker RUST_BACKTRACE=0
failed=()

# suite NAME FILTER...: runs the tests of an executable whose names hold one of the filters.
suite() {
    local name=$1 start=$SECONDS
    shift
    echo "=== $name: $*"
    "bin/$name" "$@" --test-threads=2 || failed+=("$name")
    echo "=== $name took $((SECONDS - start)) s"
}

if [[ -e filter ]]; then
    FLOCKER_TEST_OPENZFS=left,right suite e2e $(cat filter)
else
    export FLOCKER_TEST_OPENZFS=left
    suite zfs_host zfs
    [[ ! -e bin/zfs ]] || suite zfs ""
    suite conformance zfs
    suite kill zfs
    export FLOCKER_TEST_OPENZFS=left,right
    suite e2e zfs::
fi

if ((${#failed[@]})); then
    echo "FAILED in the test machine: ${failed[*]}"
    exit 1
fi
