/* Asks every address that the C library has for a name for / over HTTP, and prints the answers; built with musl. */
#include <netdb.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

int main(int count, char **arguments) {
    static const char request[] = "GET / HTTP/1.0\r\n\r\n";
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found, *it;
    struct timeval patience = {.tv_sec = 5};
    char text[4096];
    if (count != 2)
        return 2;
    int error = getaddrinfo(arguments[1], "80", &hints, &found);
    if (error) {
        fprintf(stderr, "%s\n", gai_strerror(error));
        return 1;
    }
    for (it = found; it; it = it->ai_next) {
        int fd = socket(it->ai_family, it->ai_socktype, it->ai_protocol);
        ssize_t got;
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
        if (connect(fd, it->ai_addr, it->ai_addrlen) || write(fd, request, sizeof request - 1) < 0)
            perror(arguments[1]);
        while ((got = read(fd, text, sizeof text)) > 0)
            fwrite(text, 1, got, stdout);
        close(fd);
    }
    freeaddrinfo(found);
    return 0;
}
