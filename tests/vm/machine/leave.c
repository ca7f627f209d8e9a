/* Ends QEMU with a status: writes it to the port of its isa-debug-exit device. This kernel has no /dev/port. */
#include <stdlib.h>
#include <sys/io.h>

int main(int count, char **words) {
    if (ioperm(0xf4, 4, 1))
        return 1;
    outl(count > 1 ? atoi(words[1]) : 0, 0xf4);
    return 0;
}
