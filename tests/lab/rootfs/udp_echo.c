/* A UDP echo server for the lab's guests: datagrams to port 7 (RFC 862) of either family go back to whoever sent them.

   Busybox has no UDP server. This one has no C library, so that it is small enough to be typed into a guest's shell:
   gcc -nostdlib -static -Os. x86-64 alone, as the guests are. */

#include <linux/in6.h>
#include <sys/syscall.h>

static long call(long number, long a, long b, long c, long d, long e, long f) {
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

static char buffer[65536];

void _start(void) {
    struct sockaddr_in6 name = {.sin6_family = 10, .sin6_port = 7 << 8}; /* AF_INET6; network byte order */
    long sock = call(SYS_socket, 10, 2, 0, 0, 0, 0);                     /* SOCK_DGRAM */
    if (call(SYS_bind, sock, (long)&name, sizeof name, 0, 0, 0)) call(SYS_exit, 1, 0, 0, 0, 0, 0);
    for (;;) {
        int size = sizeof name;
        long count = call(SYS_recvfrom, sock, (long)buffer, sizeof buffer, 0, (long)&name, (long)&size);
        if (count >= 0) call(SYS_sendto, sock, (long)buffer, count, 0, (long)&name, size);
    }
}
