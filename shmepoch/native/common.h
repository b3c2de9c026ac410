/* Shared by the files of the native extension: words, arguments, and the types that they make.
 *
 *   layout.h      where everything lies in a segment
 *   memory.c      Memory: a mapping with atomic access to its words
 *   wait.c        sleeping until a word has grown, and waking
 *   descriptor.c  Descriptor: a file descriptor that is closed with its object
 *   locks.c       byte locks of a file, and WriterLock: a thread lock and one of them, taken together
 *   cursor.c      Cell and Snapshots: words that only grow
 *   identifier.c  Identifier: sixteen bytes with a kind
 *   ring.c        records in the byte ring, copied while a writer may overwrite them
 *   slots.c       the operations that a segment holds: how they are found, checked and repaired
 *   transition.c  how each transition begins, is run and commits
 *   registering.c, changing.c, ending.c, watching.c   the transitions, each once
 *   restoring.c   a stored epoch, laid into fresh memory
 *   reading.c     operations, read without a lock
 *   feed.c        the completion feed, read without a lock
 *   epoch.c       Epoch: the type whose methods these are
 *   module.c      the module
 *
 * Memory order. Words that publish are stored with release and read with acquire. Bytes that may be
 * overwritten while they are copied (records, slots) are copied with relaxed word accesses, so that
 * the race is defined behaviour, between fences that make the validation around the copy sound: a
 * writer's copy begins with a release fence, so a reader that sees a byte of it sees the words stored
 * before (the invalidation); a reader's copy ends with an acquire fence, so words loaded after it (the
 * validation) are at least as new as every byte it copied.
 */

#ifndef SHMEPOCH_COMMON_H
#define SHMEPOCH_COMMON_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <fcntl.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include "layout.h"

#ifndef __linux__
#error "shmepoch needs Linux: futexes and open-file-description locks"
#endif

_Static_assert(sizeof(word_t) == WORD, "a 64-bit atomic is exactly one word");
_Static_assert(sizeof(_Atomic uint32_t) == 4, "a futex word is exactly 32 bit");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "64-bit atomics are lock-free, always");
_Static_assert(ATOMIC_INT_LOCK_FREE == 2, "32-bit atomics are lock-free, always");

/* --- types ---------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    unsigned char *base;
    Py_ssize_t size;
    /* What this process learned about spinning on this memory: how long to spin, after how many
     * waits to try again, and how many waits it has skipped. Several threads may update them at
     * once; a lost update costs one guess. */
    _Atomic uint32_t spin_ns;
    _Atomic uint32_t spin_probe_after;
    _Atomic uint32_t spin_skipped;
} Memory;

typedef _Atomic(PyObject *) shared_object_t;

typedef struct Descriptor Descriptor;

struct Descriptor {
    PyObject_HEAD
    _Atomic int fd;         /* -1: closed */
    unsigned long forks;    /* identifies the process that opened it */
    _Atomic bool inherited; /* closed because it was the parent's */
    Memory *memory;         /* mapped through the same description, or NULL */
    PyObject *on_closed;    /* makes the error of a closed one, or NULL */
    Descriptor *next;       /* among the open ones */
    Descriptor **link;      /* the pointer to this one there */
};

typedef struct WriterLock WriterLock;

/* Immutable, and holds nothing but bytes: no cycle goes through it, and it needs no lock. */
typedef struct {
    PyObject_HEAD
    PyObject *raw;
} Identifier;

typedef struct {
    PyTypeObject *memory_type;
    PyTypeObject *descriptor_type;
    PyTypeObject *writer_type;
    PyTypeObject *snapshots_type;
    PyTypeObject *identifier_type;
    PyTypeObject *epoch_type;
    PyObject *refused;       /* the exception type of a refused transition */
    Descriptor *descriptors; /* the open ones; guarded by `descriptors_lock` */
} ModuleState;

extern PyType_Spec memory_spec, descriptor_spec, writer_spec, cell_spec, snapshots_spec,
    identifier_spec, epoch_spec;
extern PyMethodDef lock_functions[], descriptor_functions[], identifier_functions[],
    layout_functions[];

/* Guards Python objects where there is no interpreter lock. */
#ifdef Py_GIL_DISABLED
#define BEGIN_EXCLUSIVE(object) Py_BEGIN_CRITICAL_SECTION(object)
#define END_EXCLUSIVE() Py_END_CRITICAL_SECTION()
#else
#define BEGIN_EXCLUSIVE(object) {
#define END_EXCLUSIVE() }
#endif

/* --- arguments ------------------------------------------------------------------------------ */

/* An unsigned 64-bit integer; OverflowError outside its range, TypeError for anything else. */
static inline bool
as_u64(PyObject *object, uint64_t *value)
{
    if (PyLong_Check(object)) {
        *value = PyLong_AsUnsignedLongLong(object);
        return !(*value == UINT64_MAX && PyErr_Occurred());
    }
    PyObject *index = PyNumber_Index(object);
    if (index == NULL) {
        return false;
    }
    *value = PyLong_AsUnsignedLongLong(index);
    Py_DECREF(index);
    return !(*value == UINT64_MAX && PyErr_Occurred());
}

/* PyLong_FromLong is faster than PyLong_FromUnsignedLongLong for a value of one digit. */
static inline PyObject *
from_u64(uint64_t value)
{
    return value <= INT32_MAX ? PyLong_FromLong((long)value) : PyLong_FromUnsignedLongLong(value);
}

static inline PyObject *
bool_object(bool value)
{
    return Py_NewRef(value ? Py_True : Py_False);
}

static inline bool
check_arity(const char *name, Py_ssize_t got, Py_ssize_t expected)
{
    if (got == expected) {
        return true;
    }
    PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, not %zd", name, expected, got);
    return false;
}

/* `on_closed` makes the error: only the caller knows what it means to be closed. */
static inline void
raise_closed(PyObject *on_closed)
{
    PyObject *error = on_closed == NULL ? NULL : PyObject_CallFunctionObjArgs(on_closed, NULL);
    if (error != NULL) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
    else if (!PyErr_Occurred()) {
        PyErr_SetString(PyExc_ValueError, "it is closed");
    }
}

/* --- words of a memory ---------------------------------------------------------------------- */

static inline word_t *
word_at(const Memory *self, Py_ssize_t offset)
{
    return (word_t *)(void *)(self->base + offset);
}

/* `count` spans of `length` bytes, `stride` apart, from `offset` on: inside, and word-aligned. */
bool check_spans(const Memory *self, Py_ssize_t offset, Py_ssize_t count, Py_ssize_t stride,
                 Py_ssize_t length);

static inline bool
check_word(const Memory *self, Py_ssize_t offset)
{
    return check_spans(self, offset, 1, 0, WORD);
}

static inline bool
parse_word(const Memory *self, PyObject *object, Py_ssize_t *offset)
{
    *offset = PyLong_AsSsize_t(object);
    if (*offset == -1 && PyErr_Occurred()) {
        return false;
    }
    return check_word(self, *offset);
}

/* (offset, count, stride) of a column of words. */
bool parse_column(PyObject *object, const char *name, PyObject *const *args, Py_ssize_t nargs,
                  Py_ssize_t *offset, Py_ssize_t *count, Py_ssize_t *stride);

/* The index of the first word that holds `value`, or -1. It searches `count` words, `stride` bytes
 * apart, and begins at index `start`. Relaxed: the caller holds the lock or verifies the word.
 * Inline, so that a stride of one word is a constant. */
static inline Py_ssize_t
find_word(const word_t *column, Py_ssize_t count, Py_ssize_t stride, uint64_t value, Py_ssize_t start)
{
    for (Py_ssize_t i = start; i < count; i++) {
        if (atomic_load_explicit(&column[i * (stride / WORD)], memory_order_relaxed) == value) {
            return i;
        }
    }
    return -1;
}

/* --- bytes of a memory: relaxed copies by words; a span of bytes always ends on a word ------- */

static inline uint64_t
padded(uint64_t length)
{
    return aligned(length, WORD);
}

/* The next word of the `left` bytes at `source`; the last word is padded with zeros. A whole word
 * has its own copy, since a constant length compiles to one move and no call. */
static inline uint64_t
word_from(const unsigned char *source, uint64_t left)
{
    uint64_t value = 0;
    if (left >= WORD) {
        memcpy(&value, source, sizeof value);
    }
    else {
        memcpy(&value, source, (size_t)left);
    }
    return value;
}

static inline void
word_to(unsigned char *target, uint64_t left, uint64_t value)
{
    memcpy(target, &value, left >= WORD ? WORD : (size_t)left);
}

static inline void
copy_out(const word_t *from, unsigned char *target, uint64_t length)
{
    for (uint64_t done = 0; done < length; done += WORD, from++) {
        word_to(target + done, length - done, atomic_load_explicit(from, memory_order_relaxed));
    }
}

static inline void
copy_in(word_t *to, const unsigned char *source, uint64_t length)
{
    for (uint64_t done = 0; done < length; done += WORD, to++) {
        atomic_store_explicit(to, word_from(source + done, length - done), memory_order_relaxed);
    }
}

/* --- memory.c, wait.c, descriptor.c ---------------------------------------------------------- */

PyObject *memory_map(PyTypeObject *type, int fd, Py_ssize_t size, int flags);
/* Maps the memory again at the same address, through a description of its own. For a forked child,
 * whose memory was mapped through the description of `fd` that it shares with its parent. Returns 0
 * or errno; after an error the old mapping stays. */
int map_again(const Memory *self, int fd);
PyObject *memory_wait_above(PyObject *object, PyObject *const *args, Py_ssize_t nargs);
PyObject *memory_wake(PyObject *object, PyObject *offset_object);
PyObject *memory_snapshots(PyObject *object, PyObject *const *args, Py_ssize_t nargs);

/* The first values of a new mapping, before anything was learned about it. */
void spin_as_long_as_it_may_pay(Memory *self);
int64_t monotonic_ns(void);
/* How long a sleep until `deadline` goes on before it polls again; 0 or below once it has passed. */
int64_t sleep_limit(int64_t deadline);

/* A number, or an object with a `fileno`. */
bool parse_descriptor(PyObject *object, int *fd);
void watch_forks(void);

/* --- locks.c ---------------------------------------------------------------------------------- */

struct flock byte_lock(short type, off_t at);

typedef enum { RUN_DONE, RUN_BUSY, RUN_FAILED } RunState;

/* Takes both locks, calls `body` and releases them. It waits for them only if `wait` says so, and
 * returns RUN_BUSY otherwise; RUN_FAILED has set an error. `body` runs with or without the
 * interpreter lock, and must neither need nor take it. */
RunState writer_run(WriterLock *self, bool wait, void (*body)(void *), void *argument);
/* The key of the participant that owns the lock; 0 for private memory. */
uint64_t writer_participant(const WriterLock *self);

#endif
