#!/bin/bash
# Boots the test machine on a folder and runs the folder's job.sh in it.
#
#   run.sh [-m MEMORY_MIB] [-c CPUS] [-s SHARE_MIB] [-t SECONDS] [-d DISK_SIZE]... [-o OUT] MACHINE FOLDER
#
# MACHINE holds vmlinux and initrd.cpio (see build.sh). job.sh runs as root in a copy of FOLDER that can be written; -o
# copies it back. Each -d adds an empty disk: /dev/vdb, /dev/vdc, ... The console goes to standard output.
# Exit status: that of job.sh (0 to 123), 124 after the time-out, 125 when the machine ended without one.
set -uo pipefail
memory=2048 cpus=2 share=512 seconds=600 disks=() out=
while getopts m:c:s:t:d:o: option; do
    case $option in
        m) memory=$OPTARG ;;
        c) cpus=$OPTARG ;;
        s) share=$OPTARG ;;
        t) seconds=$OPTARG ;;
        d) disks+=("$OPTARG") ;;
        o) out=$OPTARG ;;
        *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
machine=${1:?the folder of the machine} folder=${2:?a folder with job.sh}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The kernel has no 9p: the share is a disk, made and read back without mounting it.
truncate -s "${share}M" "$work/share.img"
/sbin/mke2fs -q -t ext4 -O ^has_journal,^metadata_csum -E lazy_itable_init=1,nodiscard -d "$folder" "$work/share.img" || exit 2
drive() { arguments+=(-drive "if=none,id=$1,format=raw,cache=unsafe,discard=unmap,file=$2" -device "virtio-blk-pci,drive=$1"); }
arguments=()
drive share "$work/share.img"
for number in "${!disks[@]}"; do
    truncate -s "${disks[number]}" "$work/disk$number.img"
    drive "disk$number" "$work/disk$number.img"
done

# Nehalem with AES is the fastest under emulation; a half-set AVX hangs at boot. Without random addresses the same program's
# code is translated once, not at each start (norandmaps).
timeout --foreground "$seconds" qemu-system-x86_64 \
    -accel tcg,thread=multi -cpu Nehalem,+aes,+pclmulqdq -M q35 -smp "$cpus" -m "$memory" \
    -nodefaults -nographic -serial stdio -no-reboot -nic none \
    -kernel "$machine/vmlinux" -initrd "$machine/initrd.cpio" \
    -device isa-debug-exit,iobase=0xf4,iosize=0x04 -device virtio-rng-pci "${arguments[@]}" \
    -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr norandmaps nowatchdog random.trust_cpu=on zvm.bus=virtio_pci" \
    </dev/null
status=$?

if ((status == 124)); then
    echo "run.sh: the machine was stopped after $seconds seconds" >&2
    exit 124
fi
if [[ -n $out ]]; then
    mkdir -p "$out"
    /sbin/debugfs -R "rdump / $out" "$work/share.img" 2>/dev/null
    rm -rf "$out/lost+found"
fi
# isa-debug-exit: twice the value plus one; the value is the job's status plus one, since QEMU fails with 1 by itself.
((status >= 3 && status % 2 == 1)) || exit 125
exit $(((status - 3) / 2))
