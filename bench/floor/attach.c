/* The floor of an attach: open a segment, map it, close it.
 *
 *     attach NAME COUNT
 *
 * Prints the nanoseconds of one, of COUNT. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static long
now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000L + time.tv_nsec;
}

int
main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    int count = atoi(argv[2]);
    long began = now();
    for (int turn = 0; turn < count; turn++) {
        struct stat found;
        int fd = shm_open(argv[1], O_RDWR, 0);
        if (fd < 0 || fstat(fd, &found))
            return 1;
        void *memory = mmap(NULL, found.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (memory == MAP_FAILED)
            return 1;
        munmap(memory, found.st_size);
        close(fd);
    }
    printf("%f\n", (double)(now() - began) / count);
    return 0;
}
