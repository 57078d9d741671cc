/* Prints the addresses that the C library's stub resolver has for a name, one a line; built with musl. */
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <sys/socket.h>

int main(int count, char **arguments) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found, *it;
    char text[INET6_ADDRSTRLEN];
    if (count != 2)
        return 2;
    int error = getaddrinfo(arguments[1], "80", &hints, &found);
    if (error) {
        fprintf(stderr, "%s\n", gai_strerror(error));
        return 1;
    }
    for (it = found; it; it = it->ai_next) {
        const void *address = it->ai_family == AF_INET
                                  ? (void *)&((struct sockaddr_in *)it->ai_addr)->sin_addr
                                  : (void *)&((struct sockaddr_in6 *)it->ai_addr)->sin6_addr;
        puts(inet_ntop(it->ai_family, address, text, sizeof text));
    }
    freeaddrinfo(found);
    return 0;
}
