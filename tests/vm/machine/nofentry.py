#!/usr/bin/env python3
"""nofentry.py MODULE.ko: turns every `call __fentry__` into a five-byte nop and drops its relocation.

ftrace does the same when it loads a module, but looks through all symbols for each of them: five seconds for zfs.ko under
emulation. Once they are gone, the list of them (__mcount_loc) can be removed. See elf(5) for the structures.
"""

import struct
import sys

RELOCATIONS, EXECUTABLE, CALL = 4, 4, 0xE8
NOP = b"\x0f\x1f\x44\x00\x00"

path = sys.argv[1]
module = bytearray(open(path, "rb").read())
(sections_at,) = struct.unpack_from("<Q", module, 0x28)
size, count, _ = struct.unpack_from("<HHH", module, 0x3A)
# Name, type, flags, address, offset, size, link, info, alignment, entry size.
sections = [struct.unpack_from("<IIQQQQIIQQ", module, sections_at + i * size) for i in range(count)]
for section in sections:
    if section[1] != RELOCATIONS:
        continue
    target, symbols = sections[section[7]], sections[section[6]]
    names = sections[symbols[6]]
    if not target[2] & EXECUTABLE:
        continue
    for entry in range(section[4], section[4] + section[5], 24):
        offset, info, _ = struct.unpack_from("<QQq", module, entry)
        (name,) = struct.unpack_from("<I", module, symbols[4] + (info >> 32) * 24)
        end = module.index(0, names[4] + name)
        at = target[4] + offset - 1
        if module[names[4] + name : end] == b"__fentry__" and module[at] == CALL:
            module[at : at + 5] = NOP
            struct.pack_into("<QQq", module, entry, offset, 0, 0)
open(path, "wb").write(module)
