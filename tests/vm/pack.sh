#!/bin/bash
# Packs the kernel and the programs of the system it runs in into OUT/vmlinux and OUT/initrd.cpio. build.sh calls it in a
# system of its own; see README.md.
#
#   pack.sh OUT
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?a folder}
kernel=$(find /lib/modules -maxdepth 1 -name '*cloud-amd64' -printf '%f\n' | sort -V | tail -1)
root=$out/root
rm -rf "$root"
mkdir -p "$root"/{bin,sbin,usr/bin,usr/sbin,lib,lib64,etc/zfs,etc/modprobe.d,proc,sys,dev,run,tmp,share,var/tmp,var/log,root}
ln -s ../lib "$root/usr/lib"

# Puts programs at the same paths, with the libraries that they are linked with.
add() {
    local program library
    for program in "$@"; do
        program=$(readlink -e "$(command -v "$program" || echo "$program")")
        [[ -e $root$program ]] || install -D "$program" "$root$program"
        ldd "$program" 2>/dev/null | grep -o '/[^ ]*' | while read -r library; do
            [[ -e $root$library ]] || install -D "$(readlink -e "$library")" "$root$library"
        done
    done
}

kernel() {
    python3 "$here/machine/vmlinux.py" "/boot/vmlinuz-$kernel" "$out/vmlinux"
    strip -g -R .comment "$out/vmlinux"
}

# The modules with what they depend on, without what only costs time to load (see nofentry.py; signatures are not enforced).
modules() {
    local wanted=(virtio_pci virtio_blk virtio_net virtio_rng loop veth sch_netem zfs) module copy
    for module in "${wanted[@]}"; do
        modprobe -S "$kernel" --show-depends "$module"
    done | awk '$1 == "insmod" { print $2 }' | sort -u | while read -r module; do
        copy=$root$module
        install -D "$module" "$copy"
        python3 "$here/machine/nofentry.py" "$copy"
        objcopy --strip-unneeded -R __mcount_loc -R .rela__mcount_loc \
            -R .orc_unwind -R .orc_unwind_ip -R .rela.orc_unwind_ip "$copy"
    done
    cp "/lib/modules/$kernel"/modules.{builtin,builtin.modinfo,order} "$root/lib/modules/$kernel/"
    depmod -b "$root" "$kernel"
    echo 'options zfs zfs_arc_max=268435456' >"$root/etc/modprobe.d/zfs.conf"
}

programs() {
    local name
    cp /bin/busybox "$root/bin/busybox"
    for name in $("$root/bin/busybox" --list); do
        [[ -e $root/bin/$name ]] || ln -s busybox "$root/bin/$name"
    done
    # Where busybox's own know too little.
    for name in ip unshare nsenter setpriv mount umount bash tc; do
        rm -f "$root/bin/$name"
    done
    add zfs zpool zdb zstream /sbin/mount.zfs ip unshare nsenter setpriv mount umount bash tc
    # Threads that are cancelled load it by name.
    add /lib/x86_64-linux-gnu/libgcc_s.so.1
    [[ -e $root/sbin/mount.zfs ]] || ln -s /usr/sbin/mount.zfs "$root/sbin/mount.zfs"
    # The kernel calls these by their paths: to load modules (veth, netem), to mount a snapshot below .zfs.
    ln -s /bin/busybox "$root/sbin/modprobe"
    ln -s /bin/busybox "$root/usr/bin/env"
    gcc -O2 -static -s -o "$root/sbin/leave" "$here/machine/leave.c"
    install "$here/machine/udevmark" "$root/sbin/udevmark"
    install "$here/machine/init" "$root/init"
}

settings() {
    ln -sf /proc/self/mounts "$root/etc/mtab"
    : >"$root/etc/fstab"
    echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
    echo 'root:x:0:' >"$root/etc/group"
    echo '127.0.0.1 localhost' >"$root/etc/hosts"
    echo 'passwd: files' >"$root/etc/nsswitch.conf"
    printf '%s\n' '-(vd[a-z]|zd|loop|sd[a-z])[0-9]* 0:0 660 *udevmark' '.* 0:0 660' >"$root/etc/mdev.conf"
}

kernel
modules
programs
settings
(cd "$root" && find . -print0 | cpio --null -o -H newc -R 0:0 --quiet) >"$out/initrd.cpio.new"
mv "$out/initrd.cpio.new" "$out/initrd.cpio"
rm -rf "$root"
ls -l "$out"
