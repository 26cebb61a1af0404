/* Looks a name up as programs do, with the C library that it is compiled with: lookup NAME 4|6|0, lookup -x ADDRESS.

   The first line is what getaddrinfo() or getnameinfo() gave and its words, the next ones are the addresses, or the name,
   each once. */
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

static int reverse(const char *text)
{
    struct addrinfo hints = {.ai_flags = AI_NUMERICHOST, .ai_socktype = SOCK_STREAM}, *found;
    char name[NI_MAXHOST];
    int status = getaddrinfo(text, NULL, &hints, &found);
    if (!status)
        status = getnameinfo(found->ai_addr, found->ai_addrlen, name, sizeof name, NULL, 0, NI_NAMEREQD);
    printf("%d %s\n", status, status ? gai_strerror(status) : "ok");
    if (!status)
        puts(name);
    return 0;
}

int main(int count, char **words)
{
    if (count != 3)
        return 2;
    if (!strcmp(words[1], "-x"))
        return reverse(words[2]);
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL;
    hints.ai_family = words[2][0] == '4' ? AF_INET : words[2][0] == '6' ? AF_INET6 : AF_UNSPEC;
    int status = getaddrinfo(words[1], NULL, &hints, &found);
    printf("%d %s\n", status, status ? gai_strerror(status) : "ok");
    for (; !status && found; found = found->ai_next) {
        char text[INET6_ADDRSTRLEN];
        const void *address = found->ai_family == AF_INET
                                  ? (const void *)&((struct sockaddr_in *)found->ai_addr)->sin_addr
                                  : (const void *)&((struct sockaddr_in6 *)found->ai_addr)->sin6_addr;
        puts(inet_ntop(found->ai_family, address, text, sizeof text));
    }
    return 0;
}
