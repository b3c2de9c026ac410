/* Sleeping until a word has grown, and waking.
 *
 * An event is one word: a 32-bit count that is the futex, and a 32-bit flag that says that a waiter
 * may sleep on it. A waiter sets the flag before it sleeps, and a waker clears it. So a killed
 * sleeper costs one unneeded wake call, once.
 */

#include "common.h"

#include <errno.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A sleeping waiter polls again after this long: the process that should wake it may have been
 * killed between its store and its wake call, and the 32-bit event count may have wrapped to the
 * same value. */
static const int64_t RECHECK_NS = 250 * 1000 * 1000;
/* A wait in the main thread checks after this long for signals that came just before it slept. */
static const int64_t SIGNALS_NS = 50 * 1000 * 1000;

/* The longest time that a wait spins before it sleeps: about the cost of a sleep and its wake-up on
 * a virtual machine, where it is high. If it were shorter, two processes that both sleep would
 * never find the other fast enough to spin for. */
static const uint32_t SPIN_MAX_NS = 100 * 1000;
static const uint32_t SPIN_MIN_NS = 4 * 1000;
/* After spinning has stopped because it does not pay, it is tried again after so many waits. If it
 * still does not pay, the next try is after twice as many. */
static const uint32_t SPIN_PROBE_AFTER = 64;
static const uint32_t SPIN_PROBE_AFTER_MAX = 4096;

typedef struct {
    _Atomic uint32_t count;
    _Atomic uint32_t sleepers;
} Event;

_Static_assert(sizeof(Event) == sizeof(uint64_t), "an event is one word");

static Event *
event_at(const Memory *self, Py_ssize_t offset)
{
    return (Event *)(void *)(self->base + offset);
}

int64_t
monotonic_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* The time at which a timeout in nanoseconds, or None, ends. */
static bool
parse_timeout(PyObject *object, int64_t *deadline)
{
    *deadline = INT64_MAX;
    if (object == Py_None) {
        return true;
    }
    int64_t timeout = PyLong_AsLongLong(object);
    if (timeout == -1 && PyErr_Occurred()) {
        return false;
    }
    const int64_t now = monotonic_ns();
    timeout = timeout < 0 ? 0 : timeout;
    *deadline = timeout > INT64_MAX - now ? INT64_MAX : now + timeout;
    return true;
}

/* How long a sleep until `deadline` lasts before it polls again; 0 or below after the deadline.
 *
 * A signal may come just before a sleep, when it has no system call to interrupt. Python runs its
 * handlers in the main thread, so that thread checks for signals more often. */
int64_t
sleep_limit(int64_t deadline)
{
    const int64_t longest = getpid() == syscall(SYS_gettid) ? SIGNALS_NS : RECHECK_NS;
    if (deadline == INT64_MAX) {
        return longest;
    }
    const int64_t remaining = deadline - monotonic_ns();
    return remaining < longest ? remaining : longest;
}

void
spin_as_long_as_it_may_pay(Memory *self)
{
    atomic_init(&self->spin_ns, SPIN_MAX_NS);
    atomic_init(&self->spin_probe_after, SPIN_PROBE_AFTER);
    atomic_init(&self->spin_skipped, 0);
}

static void
cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

typedef struct {
    word_t *value;
    uint64_t above;
    word_t *closed_flag;
    Event *event;
} Wait;

static bool
wait_is_over(const Wait *wait)
{
    return atomic_load_explicit(wait->value, memory_order_acquire) > wait->above
           || atomic_load_explicit(wait->closed_flag, memory_order_acquire) != 0;
}

/* Spins for as long as spinning has recently paid, and adapts. On separate cores the other side
 * answers while this one spins, and the budget grows. On one core it cannot answer until this one
 * sleeps, and the budget falls to zero within a few waits. */
static bool
wait_spinning(Memory *self, const Wait *wait)
{
    uint32_t budget = atomic_load_explicit(&self->spin_ns, memory_order_relaxed);
    const uint32_t after = atomic_load_explicit(&self->spin_probe_after, memory_order_relaxed);
    const bool probing = budget == 0;
    if (probing) {
        if (atomic_fetch_add_explicit(&self->spin_skipped, 1, memory_order_relaxed) < after) {
            return false;
        }
        atomic_store_explicit(&self->spin_skipped, 0, memory_order_relaxed);
        budget = SPIN_MAX_NS;
    }
    const int64_t end = monotonic_ns() + budget;
    do {
        for (int i = 0; i < 16; i++) {
            if (wait_is_over(wait)) {
                budget = budget < SPIN_MAX_NS / 2 ? budget * 2 : SPIN_MAX_NS;
                atomic_store_explicit(&self->spin_ns, budget, memory_order_relaxed);
                atomic_store_explicit(&self->spin_probe_after, SPIN_PROBE_AFTER,
                                      memory_order_relaxed);
                return true;
            }
            cpu_relax();
        }
    } while (monotonic_ns() < end);
    if (probing) {
        const uint32_t later = after < SPIN_PROBE_AFTER_MAX ? after * 2 : after;
        atomic_store_explicit(&self->spin_probe_after, later, memory_order_relaxed);
    }
    else {
        budget = budget / 2 < SPIN_MIN_NS ? 0 : budget / 2;
        atomic_store_explicit(&self->spin_ns, budget, memory_order_relaxed);
    }
    return false;
}

/* One sleep of at most `limit_ns`. Returns 0 or the errno of the futex call.
 *
 * No wake-up is lost: this side raises the flag, then the kernel compares the count; the other side
 * raises the count, then reads the flag. All four are sequentially consistent, so at least one side
 * sees the other. */
static int
wait_sleeping(const Wait *wait, int64_t limit_ns)
{
    uint32_t seen = atomic_load_explicit(&wait->event->count, memory_order_acquire);
    atomic_exchange_explicit(&wait->event->sleepers, 1, memory_order_seq_cst);
    if (wait_is_over(wait)) {
        return 0;
    }
    struct timespec limit = {.tv_sec = (time_t)(limit_ns / 1000000000),
                             .tv_nsec = (long)(limit_ns % 1000000000)};
    /* Not FUTEX_PRIVATE: the sleeper and the waker are different processes. */
    long result = syscall(SYS_futex, &wait->event->count, FUTEX_WAIT, seen, &limit, NULL, 0);
    return result == 0 ? 0 : errno;
}

/* wait_above(value, above, event, closed_flag, timeout_ns) -> bool
 *
 * Blocks until the word at `value` is above `above` or the word at `closed_flag` is not zero; False
 * if `timeout_ns` (None: no limit) passed first. Python's signal handlers run while it waits. That
 * includes a signal that came between the last check and the sleep, which interrupts no system
 * call. */
PyObject *
memory_wait_above(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Memory *self = (Memory *)object;
    Py_ssize_t value, event, closed_flag;
    Wait wait;
    if (!check_arity("wait_above", nargs, 5) || !parse_word(self, args[0], &value)
        || !as_u64(args[1], &wait.above) || !parse_word(self, args[2], &event)
        || !parse_word(self, args[3], &closed_flag)) {
        return NULL;
    }
    int64_t deadline;
    if (!parse_timeout(args[4], &deadline)) {
        return NULL;
    }
    wait.value = word_at(self, value);
    wait.closed_flag = word_at(self, closed_flag);
    wait.event = event_at(self, event);
    if (wait_is_over(&wait)) {
        Py_RETURN_TRUE;
    }
    bool over = false, spin = true;
    for (;;) {
        const int64_t limit = sleep_limit(deadline);
        if (limit <= 0) {
            return bool_object(wait_is_over(&wait));
        }
        int error = 0;
        Py_BEGIN_ALLOW_THREADS
        over = spin && limit > SPIN_MAX_NS && wait_spinning(self, &wait);
        if (!over) {
            error = wait_sleeping(&wait, limit);
            over = wait_is_over(&wait);
        }
        Py_END_ALLOW_THREADS
        spin = false;
        if (over) {
            Py_RETURN_TRUE;
        }
        if (PyErr_CheckSignals() < 0) {
            return NULL;
        }
        if (error != 0 && error != EINTR && error != EAGAIN && error != ETIMEDOUT) {
            errno = error;
            return PyErr_SetFromErrno(PyExc_OSError);
        }
    }
}

/* wake(event) -> whether a waiter may have slept. Called after the store that waiters wait for. The
 * fence at the end orders it before the next load of the caller (the doorbells). */
PyObject *
memory_wake(PyObject *object, PyObject *offset_object)
{
    Memory *self = (Memory *)object;
    Py_ssize_t offset;
    if (!parse_word(self, offset_object, &offset)) {
        return NULL;
    }
    Event *event = event_at(self, offset);
    atomic_fetch_add_explicit(&event->count, 1, memory_order_seq_cst);
    bool asleep = atomic_load_explicit(&event->sleepers, memory_order_seq_cst) != 0
                  && atomic_exchange_explicit(&event->sleepers, 0, memory_order_seq_cst) != 0;
    if (asleep) {
        syscall(SYS_futex, &event->count, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
    atomic_thread_fence(memory_order_seq_cst);
    return bool_object(asleep);
}
