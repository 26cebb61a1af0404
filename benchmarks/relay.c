/* A guest at native speed: carries the frames of a tap device over the QEMU stream protocol.
 *
 * A network namespace with a tap is a Linux guest without the cost of emulation. What a QEMU process does for
 * `-netdev stream` is done here with as little work as possible, so that a benchmark measures the network process behind
 * the socket and not the relay:
 *
 *   tap -> stream   read(2) one frame at a time (a tap has no batched read) until EAGAIN or until the buffer is full, each
 *                   behind its 32 bit big endian length; then sendmmsg(2), one message per frame
 *   stream -> tap   one recv(2) of up to 1 MiB, then one write(2) per frame (a tap has no batched write either)
 *
 * Why one message per frame and the default socket buffer, when a single send of everything would be cheaper: QEMU writes
 * each frame by itself, and its readers have come to rely on it. passt of 2023 loses its place in the stream for ever when
 * a read ends within a length word, or when a frame arrives in more than two pieces; with one big send that is what
 * happens after a second or so, and its throughput falls to nothing.
 *
 * One thread, because a second one only adds wake-ups on a machine with few cores. While the stream does not take what
 * was read from the tap, the tap is not read: its queue fills and the guest's kernel drops. The other direction goes on
 * meanwhile, so that two ends which wait for each other cannot lock up.
 *
 * Usage: relay TAP SOCKET|FD      Run it inside the guest's network namespace. It makes the tap, connects (or takes the
 *                                 connected descriptor FD), says "ready", and ends when the other side hangs up.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { LENGTH = 4, MAX_FRAME = 65535 + 14, BUFFER = 1 << 20, BATCH = 512 };

/* Frames on their way from the tap to the stream: message i is frame i with its length word. */
struct outgoing {
	unsigned char bytes[BUFFER];
	struct iovec frames[BATCH];
	struct mmsghdr messages[BATCH];
	unsigned int next, count;
};

static struct outgoing outgoing;
static unsigned char incoming[BUFFER];

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static int open_tap(const char *name)
{
	struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI};
	int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);

	if (fd < 0)
		die("/dev/net/tun");
	strncpy(request.ifr_name, name, IFNAMSIZ - 1);
	if (ioctl(fd, TUNSETIFF, &request) < 0)
		die("TUNSETIFF");
	return fd;
}

static int open_stream(const char *where)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd;

	if (where[0] != '/') {
		fd = atoi(where);
	} else {
		fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (fd < 0)
			die("socket");
		strncpy(address.sun_path, where, sizeof(address.sun_path) - 1);
		if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
			die(where);
	}
	if (fcntl(fd, F_SETFL, O_NONBLOCK) < 0)
		die("fcntl");
	return fd;
}

static void read_frames(int tap, struct outgoing *out)
{
	size_t end = 0;

	out->next = out->count = 0;
	while (out->count < BATCH && end + LENGTH + MAX_FRAME <= BUFFER) {
		unsigned char *start = out->bytes + end;
		ssize_t n = read(tap, start + LENGTH, MAX_FRAME);
		uint32_t length;

		if (n <= 0)
			break;
		length = htonl(n);
		memcpy(start, &length, LENGTH);
		out->frames[out->count] = (struct iovec){.iov_base = start, .iov_len = LENGTH + n};
		out->messages[out->count].msg_hdr =
			(struct msghdr){.msg_iov = &out->frames[out->count], .msg_iovlen = 1};
		out->count++;
		end += LENGTH + n;
	}
}

static void send_frames(int stream, struct outgoing *out)
{
	while (out->next < out->count) {
		int sent = sendmmsg(stream, out->messages + out->next, out->count - out->next, MSG_NOSIGNAL);

		if (sent < 0) {
			if (errno == EAGAIN || errno == EINTR)
				return;
			die("send");
		}
		while (sent--) {
			struct iovec *frame = out->frames + out->next;
			size_t taken = out->messages[out->next].msg_len;

			if (taken < frame->iov_len) {	/* the stream is full in the middle of this frame */
				frame->iov_base = (unsigned char *)frame->iov_base + taken;
				frame->iov_len -= taken;
				return;
			}
			out->next++;
		}
	}
}

/* Returns how many bytes of an incomplete frame are left, moved to the start of the buffer. */
static size_t write_frames(int tap, size_t end)
{
	size_t at = 0;

	while (end - at >= LENGTH) {
		uint32_t length;

		memcpy(&length, incoming + at, LENGTH);
		length = ntohl(length);
		if (length > MAX_FRAME) {
			fprintf(stderr, "relay: a frame of %u bytes\n", length);
			exit(1);
		}
		if (end - at - LENGTH < length)
			break;
		/* EIO: the tap is not up yet. EINVAL: a frame that is too short for Ethernet. Both are dropped. */
		if (write(tap, incoming + at + LENGTH, length) < 0 && errno != EIO && errno != EAGAIN && errno != EINVAL)
			die("write to tap");
		at += LENGTH + length;
	}
	memmove(incoming, incoming + at, end - at);
	return end - at;
}

int main(int count, char **arguments)
{
	struct outgoing *out = &outgoing;
	size_t left = 0;
	int tap, stream;

	if (count != 3) {
		fprintf(stderr, "usage: relay TAP SOCKET|FD\n");
		return 2;
	}
	tap = open_tap(arguments[1]);
	stream = open_stream(arguments[2]);
	printf("ready\n");
	fflush(stdout);
	for (;;) {
		bool full = out->next < out->count;
		struct pollfd wait[2] = {
			{.fd = full ? -1 : tap, .events = POLLIN},
			{.fd = stream, .events = POLLIN | (full ? POLLOUT : 0)},
		};

		if (poll(wait, 2, -1) < 0 && errno != EINTR)
			die("poll");
		if (wait[1].revents & (POLLIN | POLLHUP | POLLERR)) {
			ssize_t n = recv(stream, incoming + left, BUFFER - left, 0);

			if (n == 0 || (n < 0 && errno == ECONNRESET))
				return 0;
			if (n < 0 && errno != EAGAIN && errno != EINTR)
				die("recv");
			if (n > 0)
				left = write_frames(tap, left + n);
		}
		if (!full && wait[0].revents & POLLIN)
			read_frames(tap, out);
		send_frames(stream, out);
	}
}
