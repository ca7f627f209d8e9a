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

export FLOCKER_TEST_DISK=/dev/vdd FLOCKER_REQUIRE=openzfs,setpriv FLOCKER_TEST_BINARY=$PWD/bin/flocker RUST_BACKTRACE=0
suites=()

# suite NAME POOLS FILTER...: starts the tests of an executable whose names hold one of the filters. The suites run side by
# side: most of their time goes into the start of one program after the other.
suite() {
    local name=$1 pools=$2
    shift 2
    (
        set -o pipefail
        FLOCKER_TEST_OPENZFS=$pools "bin/$name" "$@" --test-threads=1 --nocapture 2>&1 |
            while read -r line; do echo "$name $1, $SECONDS s: $line"; done
    ) &
    suites+=("$name $1=$!")
}

if [[ -e filter ]]; then
    suite e2e left,right $(cat filter)
else
    # Each of the tests that only this machine can run, and those of the others that cross from node to node.
    # kill.rs is left out: it opens a pool some hundred times, which takes too long under emulation.
    suite e2e left,right openzfs:: zfs::history_goes_natively zfs::history_goes_from_zfs_to_a_directory zfs::clones zfs::natives zfs::what_the_sender
    suite conformance left zfs_passes_the_even
    suite conformance left zfs_passes_the_odd
    suite zfs left ""
fi

failed=()
for suite in "${suites[@]}"; do
    name=${suite%%=*}
    wait "${suite#*=}" || failed+=("$name")
    echo "=== $name ended, after $SECONDS s"
done
if ((${#failed[@]})); then
    echo "FAILED in the test machine: ${failed[*]}"
    exit 1
fi
