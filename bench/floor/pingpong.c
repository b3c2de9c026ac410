/* The floor of a wake round trip: two processes, one word each.
 *
 *     pingpong spin|futex|timed CPU CPU COUNT PAUSE
 *
 * `timed` sleeps with a timeout, like a process whose other side may be dead.
 * Both spin for PAUSE nanoseconds before they signal, so that the other one is asleep by then.
 * Prints the nanoseconds of each round trip, one on each line. With a pause, only those in which both
 * slept, without the pause of the answer. */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef struct {
    _Alignas(128) _Atomic unsigned value;
} Word;

static int sleeping;
static struct timespec limit = {.tv_nsec = 250000000}, *timeout;

static void
pin(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set)) {
        perror("sched_setaffinity");
        exit(1);
    }
}

static void
say(Word *word, unsigned value)
{
    atomic_store(&word->value, value);
    if (sleeping)
        syscall(SYS_futex, &word->value, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static void
hear(Word *word, unsigned value)
{
    unsigned found;
    while ((found = atomic_load(&word->value)) != value)
        if (sleeping)
            syscall(SYS_futex, &word->value, FUTEX_WAIT, found, timeout, NULL, 0);
}

static long
now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000L + time.tv_nsec;
}

/* The voluntary context switches of this process. */
static long
sleeps(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return used.ru_nvcsw;
}

static void
spin(long pause)
{
    for (long until = pause ? now() + pause : 0; until && now() < until;)
        ;
}

int
main(int argc, char **argv)
{
    if (argc != 6)
        return 2;
    sleeping = strcmp(argv[1], "spin") != 0;
    timeout = strcmp(argv[1], "timed") ? NULL : &limit;
    unsigned count = atoi(argv[4]);
    long pause = atol(argv[5]);
    Word *words = mmap(NULL, 4096 + count, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    long *taken = calloc(count, sizeof *taken);
    char *asker_slept = calloc(count, 1);
    if (words == MAP_FAILED || !taken || !asker_slept)
        return 1;
    char *answerer_slept = (char *)words + 4096;
    pid_t child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pin(atoi(argv[3]));
        for (unsigned turn = 1; turn <= count; turn++) {
            long before = sleeps();
            hear(&words[0], turn);
            answerer_slept[turn - 1] = sleeps() > before;
            spin(pause);
            say(&words[1], turn);
        }
        _exit(0);
    }
    pin(atoi(argv[2]));
    for (unsigned turn = 1; turn <= count; turn++) {
        spin(pause);
        long before = sleeps();
        long began = now();
        say(&words[0], turn);
        hear(&words[1], turn);
        taken[turn - 1] = now() - began - pause;
        asker_slept[turn - 1] = sleeps() > before;
    }
    waitpid(child, NULL, 0);
    for (unsigned turn = 0; turn < count; turn++)
        if (!pause || (asker_slept[turn] && answerer_slept[turn]))
            printf("%ld\n", taken[turn]);
    return 0;
}
