#!/usr/bin/env python3
"""vmlinux.py VMLINUZ OUT: takes the kernel's ELF image out of Debian's compressed one.

Under emulation that spares the machine its own unpacking and relocating (PVH boot). See the kernel's
Documentation/arch/x86/boot.rst for the header.
"""

import struct
import subprocess
import sys

image = open(sys.argv[1], "rb").read()
setup_sectors = image[0x1F1]
payload_offset, payload_length = struct.unpack_from("<II", image, 0x248)
start = (setup_sectors + 1) * 512 + payload_offset
# The last four bytes are the unpacked size.
payload = image[start : start + payload_length - 4]
unpacked = subprocess.run(["lz4", "-dc"], input=payload, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
assert unpacked.startswith(b"\x7fELF"), "the kernel is not packed with LZ4"
open(sys.argv[2], "wb").write(unpacked)
