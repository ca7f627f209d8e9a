#!/bin/bash
# Builds the test machine from Debian's packages alone: OUT/vmlinux and OUT/initrd.cpio. As root; about ten minutes, most of
# them for compiling the kernel module.
#
#   build.sh OUT
#
# zfsutils-linux and zfs-fuse remove each other, so that this happens in a Debian system of its own, made by debootstrap in
# a temporary folder and removed at the end. FLOCKER_DEBIAN_MIRROR=URL overrides the mirror that apt uses here.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?a folder to build into}
suite=bookworm

# Kernel, headers and ZFS are one release's; the rest makes the image.
kernel=(linux-image-cloud-amd64 linux-headers-cloud-amd64 busybox-static lz4 cpio iproute2 gcc libc6-dev binutils kmod python3-minimal)
zfs=(zfs-dkms zfsutils-linux)

mirror=${FLOCKER_DEBIAN_MIRROR:-$(
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Component: main' 2>/dev/null |
        grep -v -e security -e updates | head -1
)}
mirror=${mirror:-http://deb.debian.org/debian}

mkdir -p "$out"
system=$(mktemp -d)
leave() {
    umount "$system/proc" 2>/dev/null || true
    rm -rf --one-file-system "$system"
}
trap leave EXIT

debootstrap --variant=minbase "$suite" "$system" "$mirror"
cat >"$system/etc/apt/sources.list" <<SOURCES
deb $mirror $suite main contrib
deb $mirror $suite-updates main
deb $mirror $suite-backports main contrib
SOURCES
# Whatever apt needs here to reach its mirror (a proxy, for example).
cp -r /etc/apt/apt.conf.d/. "$system/etc/apt/apt.conf.d/" 2>/dev/null || true
# No package starts anything in there.
printf '#!/bin/sh\nexit 101\n' >"$system/usr/sbin/policy-rc.d"
chmod +x "$system/usr/sbin/policy-rc.d"
mount -t proc proc "$system/proc"

inside() { chroot "$system" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive HOME=/root "$@"; }
inside apt-get update -q
inside apt-get install -q -y --no-install-recommends "${kernel[@]}"
inside apt-get install -q -y --no-install-recommends -t "$suite-backports" "${zfs[@]}"

cp -r "$here" "$system/vm"
mkdir "$system/out"
inside /vm/pack.sh /out
cp "$system/out"/{vmlinux,initrd.cpio} "$out/"
