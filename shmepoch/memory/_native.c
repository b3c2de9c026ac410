/* The native edge of shmepoch: atomics, ring copies, futexes and record locks on mapped memory.
 *
 * Nothing here knows what the memory holds. A caller names byte offsets; every function checks
 * that they are inside the mapping and aligned before it touches a byte, then does one thing.
 *
 *   Memory     a mapping, shared (of a descriptor) or private, with atomic access to its words
 *   Cell       one word of a Memory that only grows, behind a gate word that can close it
 *   Snapshots  several words of a Memory that only grow, read at one instant
 *   Transitions   the common case of an epoch's most frequent transitions, each in one call
 *   Descriptor a descriptor that is closed with its object, and known to a forked child
 *   WriterLock a thread lock and an open-file-description lock, taken together
 *   IfFree     the same lock, as a context whose entry waits for nothing
 *   try_lock, unlock, is_locked   single open-file-description byte locks
 *   leave_inherited   closes, in a forked child, the descriptors of its parent
 *
 * Memory order. Words that publish are stored with release and read with acquire. Bytes that may be
 * overwritten while they are copied (ring entries, slots) are copied with relaxed word accesses, so
 * that the race is defined behaviour, between fences that make the validation around the copy sound:
 * `write` begins with a release fence, so a reader that sees a byte of it sees the words stored
 * before (the invalidation); `read` ends with an acquire fence, so words loaded after it (the
 * validation) are at least as new as every byte it copied.
 *
 * The standard library's mmap is not used because it is a buffer that all code may write to with
 * plain stores; a Memory is read-only to Python but for its atomic methods.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef __linux__
#error "shmepoch needs Linux: futexes and open-file-description locks"
#endif

_Static_assert(sizeof(_Atomic uint64_t) == 8, "a 64-bit atomic is exactly one word");
_Static_assert(sizeof(_Atomic uint32_t) == 4, "a futex word is exactly 32 bit");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "64-bit atomics are lock-free, always");
_Static_assert(ATOMIC_INT_LOCK_FREE == 2, "32-bit atomics are lock-free, always");

#define WORD ((Py_ssize_t)sizeof(uint64_t))

typedef _Atomic uint64_t word_t;

/* A sleeping waiter looks again after this long: the process that was to wake it may have been
 * killed between its store and its wake call, and the 32-bit event count may have come round. */
static const int64_t RECHECK_NS = 250 * 1000 * 1000;
/* A wait in the main thread looks for signals that came just before it slept after this long. */
static const int64_t SIGNALS_NS = 50 * 1000 * 1000;

/* The longest that a wait spins before it sleeps: what a sleep and the wake-up from it cost where
 * they are dear, as on virtual machines. Shorter, and of two processes that both sleep neither would
 * ever find the other fast enough to spin for. */
static const uint32_t SPIN_MAX_NS = 100 * 1000;
static const uint32_t SPIN_MIN_NS = 4 * 1000;
/* Once spinning was found not to pay, it is tried again after so many waits, and each time that it
 * still does not pay, after twice as many. */
static const uint32_t SPIN_PROBE_AFTER = 64;
static const uint32_t SPIN_PROBE_AFTER_MAX = 4096;

typedef struct {
    PyObject_HEAD
    unsigned char *base;
    Py_ssize_t size;
    /* What this process learned about spinning on this memory: how long; and after how many waits
     * to try again, and how many there were since it gave up. Several threads may learn at once; a
     * lost update costs one guess. */
    _Atomic uint32_t spin_ns;
    _Atomic uint32_t spin_probe_after;
    _Atomic uint32_t spin_skipped;
} Memory;

typedef struct Descriptor Descriptor;

typedef struct {
    PyTypeObject *memory_type;
    PyTypeObject *descriptor_type;
    Descriptor *descriptors; /* the open ones; guarded by `descriptors_lock` */
    PyTypeObject *transitions_type;
    PyTypeObject *snapshots_type;
    PyTypeObject *if_free_type;
} ModuleState;

/* --- arguments ------------------------------------------------------------------------------ */

/* An unsigned 64-bit integer; OverflowError outside its range, TypeError for anything else. */
static bool
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

/* PyLong_FromLong makes what fits one digit of an int faster than its unsigned sister. */
static PyObject *
from_u64(uint64_t value)
{
    return value <= INT32_MAX ? PyLong_FromLong((long)value) : PyLong_FromUnsignedLongLong(value);
}

/* `count` spans of `length` bytes, `stride` apart, from `offset` on: inside, and word-aligned. */
static bool
check_spans(const Memory *self, Py_ssize_t offset, Py_ssize_t count, Py_ssize_t stride,
            Py_ssize_t length)
{
    const bool aligned = offset % WORD == 0 && stride % WORD == 0;
    if (aligned && offset >= 0 && count >= 0 && stride >= 0 && length >= 0
        && offset <= self->size && length <= self->size - offset
        && (count <= 1 || stride == 0 || (count - 1) <= (self->size - offset - length) / stride)) {
        return true;
    }
    PyErr_Format(PyExc_IndexError,
                 "%zd spans of %zd bytes, %zd apart, at offset %zd are not word-aligned inside a "
                 "memory of %zd bytes",
                 count, length, stride, offset, self->size);
    return false;
}

static bool
check_word(const Memory *self, Py_ssize_t offset)
{
    return check_spans(self, offset, 1, 0, WORD);
}

static word_t *
word_at(const Memory *self, Py_ssize_t offset)
{
    return (word_t *)(void *)(self->base + offset);
}

static bool
parse_word(const Memory *self, PyObject *object, Py_ssize_t *offset)
{
    *offset = PyLong_AsSsize_t(object);
    if (*offset == -1 && PyErr_Occurred()) {
        return false;
    }
    return check_word(self, *offset);
}

static bool
check_arity(const char *name, Py_ssize_t got, Py_ssize_t expected)
{
    if (got == expected) {
        return true;
    }
    PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, not %zd", name, expected, got);
    return false;
}

/* A number, or what has a `fileno`. */
static bool
parse_descriptor(PyObject *object, int *fd)
{
    long descriptor =
        PyLong_Check(object) ? PyLong_AsLong(object) : PyObject_AsFileDescriptor(object);
    if (descriptor == -1 && PyErr_Occurred()) {
        return false;
    }
    if (descriptor < 0 || descriptor > INT_MAX) {
        PyErr_Format(PyExc_ValueError, "no descriptor %ld", descriptor);
        return false;
    }
    *fd = (int)descriptor;
    return true;
}

static PyObject *
bool_object(bool value)
{
    PyObject *result = value ? Py_True : Py_False;
    Py_INCREF(result);
    return result;
}

/* --- Memory: life ---------------------------------------------------------------------------- */

static PyObject *
memory_map(PyTypeObject *type, int fd, Py_ssize_t size, int flags)
{
    if (size <= 0) {
        PyErr_Format(PyExc_ValueError, "a memory has at least one byte, not %zd", size);
        return NULL;
    }
    void *base = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (base == MAP_FAILED) {
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Memory *self = (Memory *)allocate(type, 0);
    if (self == NULL) {
        munmap(base, (size_t)size);
        return NULL;
    }
    self->base = base;
    self->size = size;
    atomic_init(&self->spin_ns, SPIN_MAX_NS);
    atomic_init(&self->spin_probe_after, SPIN_PROBE_AFTER);
    atomic_init(&self->spin_skipped, 0);
    return (PyObject *)self;
}

/* Another description of the file of `fd`; -1 with an error set. */
static int
open_again(int fd)
{
    char link[sizeof "/proc/self/fd/" + 3 * sizeof fd];
    PyOS_snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int again = open(link, O_RDWR | O_CLOEXEC);
    if (again < 0) {
        PyErr_SetFromErrno(PyExc_OSError);
    }
    return again;
}

/* Through a description of its own: a mapping holds the one it was made through, also in a forked
 * child and long after the descriptor was closed, and with it every lock. */
static PyObject *
memory_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"fd", "size", NULL};
    PyObject *fd_object;
    int fd;
    Py_ssize_t size;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "On:Memory", keywords, &fd_object, &size)
        || !parse_descriptor(fd_object, &fd)) {
        return NULL;
    }
    int again = open_again(fd);
    if (again < 0) {
        return NULL;
    }
    PyObject *self = memory_map(type, again, size, MAP_SHARED);
    close(again);
    return self;
}

/* Mapped anew, through a description of its own and where it was, so that its bytes stay where
 * it is. For a forked child whose memory was mapped through the description of `fd`, which it shares
 * with its parent. False with an error set: it is mapped as before. */
static bool
map_again(const Memory *self, int fd)
{
    int again = open_again(fd);
    if (again < 0) {
        return false;
    }
    void *base = mmap(self->base, (size_t)self->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                      again, 0);
    if (base == MAP_FAILED) {
        PyErr_SetFromErrno(PyExc_OSError);
    }
    close(again);
    return base != MAP_FAILED;
}

static PyObject *
memory_reopen(PyObject *object, PyObject *fd_object)
{
    int fd;
    if (!parse_descriptor(fd_object, &fd) || !map_again((const Memory *)object, fd)) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *
memory_private(PyObject *type, PyObject *size_object)
{
    Py_ssize_t size = PyLong_AsSsize_t(size_object);
    if (size == -1 && PyErr_Occurred()) {
        return NULL;
    }
    return memory_map((PyTypeObject *)type, -1, size, MAP_PRIVATE | MAP_ANONYMOUS);
}

static void
memory_dealloc(PyObject *object)
{
    Memory *self = (Memory *)object;
    PyTypeObject *type = Py_TYPE(object);
    if (self->base != NULL) {
        munmap(self->base, (size_t)self->size);
    }
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

/* Exported read-only: a store through a view would not be atomic. */
static int
memory_getbuffer(PyObject *object, Py_buffer *view, int flags)
{
    Memory *self = (Memory *)object;
    return PyBuffer_FillInfo(view, object, self->base, self->size, 1, flags);
}

static Py_ssize_t
memory_length(PyObject *object)
{
    return ((Memory *)object)->size;
}

/* --- Memory: single words ---------------------------------------------------------------------- */

/* Acquire; pairs with the release in `store` and in the read-modify-writes: what was written before
 * a word was published is seen by every reader of the word. */
static PyObject *
memory_load(PyObject *object, PyObject *offset_object)
{
    Memory *self = (Memory *)object;
    Py_ssize_t offset;
    if (!parse_word(self, offset_object, &offset)) {
        return NULL;
    }
    return from_u64(
        atomic_load_explicit(word_at(self, offset), memory_order_acquire));
}

static bool
parse_word_and_value(PyObject *object, const char *name, PyObject *const *args, Py_ssize_t nargs,
                     word_t **word, uint64_t *value)
{
    Memory *self = (Memory *)object;
    Py_ssize_t offset;
    if (!check_arity(name, nargs, 2) || !parse_word(self, args[0], &offset)
        || !as_u64(args[1], value)) {
        return false;
    }
    *word = word_at(self, offset);
    return true;
}

/* Release: publishes everything this thread wrote before. */
static PyObject *
memory_store(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    word_t *word;
    uint64_t value;
    if (!parse_word_and_value(object, "store", args, nargs, &word, &value)) {
        return NULL;
    }
    atomic_store_explicit(word, value, memory_order_release);
    Py_RETURN_NONE;
}

/* Sequentially consistent: a bell mask is set before, or taken after, a look at another word. */
static PyObject *
memory_exchange(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    word_t *word;
    uint64_t value;
    if (!parse_word_and_value(object, "exchange", args, nargs, &word, &value)) {
        return NULL;
    }
    return from_u64(
        atomic_exchange_explicit(word, value, memory_order_seq_cst));
}

static PyObject *
memory_fetch_add(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    word_t *word;
    uint64_t value;
    if (!parse_word_and_value(object, "fetch_add", args, nargs, &word, &value)) {
        return NULL;
    }
    return from_u64(
        atomic_fetch_add_explicit(word, value, memory_order_seq_cst));
}

static PyObject *
memory_fetch_or(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    word_t *word;
    uint64_t value;
    if (!parse_word_and_value(object, "fetch_or", args, nargs, &word, &value)) {
        return NULL;
    }
    return from_u64(atomic_fetch_or_explicit(word, value, memory_order_seq_cst));
}

/* --- Memory: many words -------------------------------------------------------------------------- */

static bool
parse_column(PyObject *object, const char *name, PyObject *const *args, Py_ssize_t nargs,
             Py_ssize_t *offset, Py_ssize_t *count, Py_ssize_t *stride)
{
    if (!check_arity(name, nargs, 3)) {
        return false;
    }
    *offset = PyLong_AsSsize_t(args[0]);
    *count = PyLong_AsSsize_t(args[1]);
    *stride = PyLong_AsSsize_t(args[2]);
    if (PyErr_Occurred()) {
        return false;
    }
    return check_spans((Memory *)object, *offset, *count, *stride, WORD);
}

/* Each word with acquire, one after the other: not one instant. */
static PyObject *
memory_load_column(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t offset, count, stride;
    if (!parse_column(object, "load_column", args, nargs, &offset, &count, &stride)) {
        return NULL;
    }
    PyObject *tuple = PyTuple_New(count);
    for (Py_ssize_t i = 0; tuple != NULL && i < count; i++) {
        PyObject *value = from_u64(atomic_load_explicit(
            word_at((Memory *)object, offset + i * stride), memory_order_acquire));
        if (value == NULL || PyTuple_SetItem(tuple, i, value) < 0) {
            Py_CLEAR(tuple);
        }
    }
    return tuple;
}

#define SNAPSHOT_MAX 8
/* Far more than writers that take turns ever spoil: memory that never stands still ends here. */
#define SNAPSHOT_PASSES 1000

/* Words that only grow, as they stood at one instant: two equal passes mean that none moved between
 * its two reads, so all stood together at the end of the first. Acquire keeps the passes apart. After
 * SNAPSHOT_PASSES each word is what it was at some instant of the call, which is no older. */
static void
load_at_once(const Memory *self, Py_ssize_t offset, Py_ssize_t count, Py_ssize_t stride,
             uint64_t *words)
{
    bool moved = true; /* the first pass has none before it to be equal to */
    for (int pass = 0; moved && pass < SNAPSHOT_PASSES; pass++) {
        moved = pass == 0;
        for (Py_ssize_t i = 0; i < count; i++) {
            uint64_t value =
                atomic_load_explicit(word_at(self, offset + i * stride), memory_order_acquire);
            moved = moved || value != words[i];
            words[i] = value;
        }
    }
}

/* The index of the first of `count` words, `stride` apart, from the one with index `start` on, that
 * holds `value`, or -1. Relaxed: the caller locks or verifies what is found. Where it lies is loaded
 * once: the compiler would load it again beside each atomic load. Inline, so that the stride of those
 * that lie side by side is a constant. */
static inline Py_ssize_t
find_word(const Memory *self, Py_ssize_t offset, Py_ssize_t count, Py_ssize_t stride,
          uint64_t value, Py_ssize_t start)
{
    if (start >= count) {
        return -1;
    }
    const word_t *column = word_at(self, offset);
    for (Py_ssize_t i = start; i < count; i++) {
        if (atomic_load_explicit(&column[i * (stride / WORD)], memory_order_relaxed) == value) {
            return i;
        }
    }
    return -1;
}

/* find(offset, count, value, start[, stride]); without a stride, of words that lie side by side */
static PyObject *
memory_find(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Memory *self = (Memory *)object;
    uint64_t value;
    const bool apart = nargs == 5;
    if (!apart && !check_arity("find", nargs, 4)) {
        return NULL;
    }
    Py_ssize_t offset = PyLong_AsSsize_t(args[0]);
    Py_ssize_t count = PyLong_AsSsize_t(args[1]);
    Py_ssize_t start = PyLong_AsSsize_t(args[3]);
    Py_ssize_t stride = apart ? PyLong_AsSsize_t(args[4]) : WORD;
    if (PyErr_Occurred() || !as_u64(args[2], &value)
        || !check_spans(self, offset, count, stride, WORD)) {
        return NULL;
    }
    if (start < 0) {
        return PyErr_Format(PyExc_IndexError, "a search starts at 0 or above, not %zd", start);
    }
    return PyLong_FromSsize_t(apart ? find_word(self, offset, count, stride, value, start)
                                    : find_word(self, offset, count, WORD, value, start));
}

/* --- Memory: bytes --------------------------------------------------------------------------- */

/* The next word of the `left` bytes from `source` on, of which the last is padded with zeros: a span of
 * bytes always ends on a word. A whole word is copied apart, since its constant length is one move and
 * no call. */
static uint64_t
word_from(const unsigned char *source, Py_ssize_t left)
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

static void
word_to(unsigned char *target, Py_ssize_t left, uint64_t value)
{
    if (left >= WORD) {
        memcpy(target, &value, sizeof value);
    }
    else {
        memcpy(target, &value, (size_t)left);
    }
}

static void
copy_out(const Memory *self, Py_ssize_t offset, unsigned char *target, Py_ssize_t length)
{
    const word_t *word = word_at(self, offset);
    for (; length > 0; word++, target += WORD, length -= WORD) {
        word_to(target, length, atomic_load_explicit(word, memory_order_relaxed));
    }
}

static void
copy_in(const Memory *self, Py_ssize_t offset, const unsigned char *source, Py_ssize_t length)
{
    word_t *word = word_at(self, offset);
    for (; length > 0; word++, source += WORD, length -= WORD) {
        atomic_store_explicit(word, word_from(source, length), memory_order_relaxed);
    }
}

static Py_ssize_t
padded(Py_ssize_t length)
{
    return (length + WORD - 1) / WORD * WORD;
}

static PyObject *
memory_read(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Memory *self = (Memory *)object;
    if (!check_arity("read", nargs, 2)) {
        return NULL;
    }
    Py_ssize_t offset = PyLong_AsSsize_t(args[0]);
    Py_ssize_t length = PyLong_AsSsize_t(args[1]);
    if (PyErr_Occurred() || !check_spans(self, offset, 1, 0, length)
        || !check_spans(self, offset, 1, 0, padded(length))) {
        return NULL;
    }
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, length);
    if (bytes != NULL) {
        copy_out(self, offset, (unsigned char *)PyBytes_AsString(bytes), length);
        atomic_thread_fence(memory_order_acquire);
    }
    return bytes;
}

static PyObject *
memory_write(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Memory *self = (Memory *)object;
    char *source;
    Py_ssize_t length;
    if (!check_arity("write", nargs, 2)) {
        return NULL;
    }
    Py_ssize_t offset = PyLong_AsSsize_t(args[0]);
    if ((offset == -1 && PyErr_Occurred()) || PyBytes_AsStringAndSize(args[1], &source, &length) < 0
        || !check_spans(self, offset, 1, 0, padded(length))) {
        return NULL;
    }
    atomic_thread_fence(memory_order_release);
    copy_in(self, offset, (const unsigned char *)source, length);
    Py_RETURN_NONE;
}

/* detach(): a copy takes the memory's place, which no other process sees. The others may store
 * meanwhile, so that the copy is of no one moment. */
static PyObject *
memory_detach(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    const Memory *self = (const Memory *)object;
    const size_t size = (size_t)self->size;
    void *copy = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (copy == MAP_FAILED) {
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    copy_out(self, 0, copy, self->size);
    if (mremap(copy, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, self->base) == MAP_FAILED) {
        PyErr_SetFromErrno(PyExc_OSError);
        munmap(copy, size);
        return NULL;
    }
    Py_RETURN_NONE;
}

/* --- Memory: rings --------------------------------------------------------------------------
 *
 * A ring of byte strings: an index ring of (position, checksum, length and tag) by sequence, and a
 * byte ring that the positions, which only grow, are taken modulo. Both are the caller's; so are
 * the words that say which sequences are valid.
 */

typedef struct {
    Py_ssize_t index, capacity; /* the index ring's offset, and its number of entries */
    Py_ssize_t bytes, budget;   /* the byte ring's offset and size */
} Ring;

#define INDEX_WORDS 3
#define LENGTH_BITS 32

static bool
parse_ring(const Memory *self, PyObject *object, Ring *ring)
{
    if (!PyTuple_Check(object)) {
        PyErr_SetString(PyExc_TypeError, "a ring is a tuple (index, capacity, bytes, budget)");
        return false;
    }
    if (!PyArg_ParseTuple(object, "nnnn;a ring is (index, capacity, bytes, budget)", &ring->index,
                          &ring->capacity, &ring->bytes, &ring->budget)) {
        return false;
    }
    if (ring->capacity <= 0 || ring->budget <= 0 || ring->budget % WORD != 0
        || ring->budget >> LENGTH_BITS != 0) {
        PyErr_SetString(PyExc_ValueError,
                        "a ring has at least one entry and a whole number of words below 4 GiB");
        return false;
    }
    return check_spans(self, ring->index, ring->capacity, INDEX_WORDS * WORD, INDEX_WORDS * WORD)
           && check_spans(self, ring->bytes, 1, 0, ring->budget);
}

static word_t *
ring_index(const Memory *self, const Ring *ring, uint64_t seq)
{
    return word_at(self, ring->index
                             + (Py_ssize_t)(seq % (uint64_t)ring->capacity) * INDEX_WORDS * WORD);
}

/* FNV-1a over words instead of bytes, seeded with the sequence: an entry that was torn, or that
 * belongs to another sequence, does not match. It guards against races, not against enemies. */
static uint64_t
checksum_step(uint64_t sum, uint64_t value)
{
    sum = (sum ^ value) * UINT64_C(0x100000001b3);
    return sum ^ (sum >> 29);
}

static uint64_t
checksum_start(uint64_t seq, Py_ssize_t length)
{
    return checksum_step(UINT64_C(0xcbf29ce484222325) ^ seq, (uint64_t)length);
}

/* Where in the byte ring a position lies, and the word after that: no division a word. */
static Py_ssize_t
ring_begin(const Ring *ring, uint64_t position)
{
    return (Py_ssize_t)(position % (uint64_t)ring->budget);
}

static Py_ssize_t
ring_next(const Ring *ring, Py_ssize_t at)
{
    return at + WORD < ring->budget ? at + WORD : 0;
}

/* Entry and index of one sequence. The caller has already stored the words that invalidate what is
 * overwritten; the fence makes them visible first. */
static void
ring_write(const Memory *self, const Ring *ring, uint64_t seq, uint64_t position, const char *data,
           Py_ssize_t length, uint64_t tag)
{
    atomic_thread_fence(memory_order_release);
    uint64_t sum = checksum_start(seq, length);
    Py_ssize_t at = ring_begin(ring, position);
    for (Py_ssize_t done = 0; done < length; done += WORD, at = ring_next(ring, at)) {
        uint64_t value = word_from((const unsigned char *)data + done, length - done);
        atomic_store_explicit(word_at(self, ring->bytes + at), value, memory_order_relaxed);
        sum = checksum_step(sum, value);
    }
    word_t *index = ring_index(self, ring, seq);
    atomic_store_explicit(&index[0], position, memory_order_relaxed);
    atomic_store_explicit(&index[1], sum, memory_order_relaxed);
    atomic_store_explicit(&index[2], tag << LENGTH_BITS | (uint64_t)length, memory_order_relaxed);
}

/* ring_put(ring, seq, position, data, tag) */
static PyObject *
memory_ring_put(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Memory *self = (Memory *)object;
    Ring ring;
    uint64_t seq, position, tag;
    char *data;
    Py_ssize_t length;
    if (!check_arity("ring_put", nargs, 5) || !parse_ring(self, args[0], &ring)
        || !as_u64(args[1], &seq) || !as_u64(args[2], &position)
        || PyBytes_AsStringAndSize(args[3], &data, &length) < 0 || !as_u64(args[4], &tag)) {
        return NULL;
    }
    if (length > ring.budget || position % WORD != 0 || tag >> (64 - LENGTH_BITS) != 0) {
        PyErr_SetString(PyExc_ValueError,
                        "a ring entry is no longer than the ring, starts on a word and has a tag "
                        "below 2**32");
        return NULL;
    }
    ring_write(self, &ring, seq, position, data, length, tag);
    Py_RETURN_NONE;
}

/* ring_at(ring, seq) -> (position, length, tag) as the index has it. Under the writer lock. */
static PyObject *
memory_ring_at(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Memory *self = (Memory *)object;
    Ring ring;
    uint64_t seq;
    if (!check_arity("ring_at", nargs, 2) || !parse_ring(self, args[0], &ring)
        || !as_u64(args[1], &seq)) {
        return NULL;
    }
    word_t *index = ring_index(self, &ring, seq);
    uint64_t position = atomic_load_explicit(&index[0], memory_order_relaxed);
    uint64_t tail = atomic_load_explicit(&index[2], memory_order_relaxed);
    return Py_BuildValue("KKK", (unsigned long long)position,
                         (unsigned long long)(tail & UINT32_MAX),
                         (unsigned long long)(tail >> LENGTH_BITS));
}

/* Copies the entry of `seq` to `target` if it is whole; `length` is what its index said before. */
static bool
ring_take(const Memory *self, const Ring *ring, uint64_t seq, Py_ssize_t length,
          unsigned char *target)
{
    word_t *index = ring_index(self, ring, seq);
    uint64_t position = atomic_load_explicit(&index[0], memory_order_relaxed);
    uint64_t expected = atomic_load_explicit(&index[1], memory_order_relaxed);
    uint64_t tail = atomic_load_explicit(&index[2], memory_order_relaxed);
    if (position % WORD != 0 || (tail & UINT32_MAX) != (uint64_t)length) {
        return false;
    }
    uint64_t sum = checksum_start(seq, length);
    Py_ssize_t at = ring_begin(ring, position);
    for (Py_ssize_t done = 0; done < length; done += WORD, at = ring_next(ring, at)) {
        uint64_t value =
            atomic_load_explicit(word_at(self, ring->bytes + at), memory_order_relaxed);
        word_to(target + done, length - done, value);
        sum = checksum_step(sum, value);
    }
    return sum == expected;
}

#define ARRAY_HEADER 5 /* MessagePack's array32: one byte, then a 32-bit big-endian count */

/* ring_gather(ring, first, last) -> (first_whole, data)
 *
 * The entries first..last, adjacent, behind a MessagePack array header: one decode reads them all.
 * Overwriting goes from the oldest on, so an entry that is not whole voids those before it: `data`
 * starts at `first_whole`. Whether that is explained is for the caller to check against its own
 * words, which the acquire fence at the end lets it load anew. Empty entries are left out. */
static PyObject *
memory_ring_gather(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Memory *self = (Memory *)object;
    Ring ring;
    uint64_t first, last;
    if (!check_arity("ring_gather", nargs, 3) || !parse_ring(self, args[0], &ring)
        || !as_u64(args[1], &first) || !as_u64(args[2], &last)) {
        return NULL;
    }
    if (last < first || last - first >= (uint64_t)ring.capacity) {
        return PyErr_Format(PyExc_ValueError, "%zd entries do not hold %llu to %llu",
                            ring.capacity, (unsigned long long)first, (unsigned long long)last);
    }
    const Py_ssize_t count = (Py_ssize_t)(last - first) + 1;
    Py_ssize_t *lengths = PyMem_Malloc((size_t)count * sizeof *lengths);
    if (lengths == NULL) {
        return PyErr_NoMemory();
    }
    Py_ssize_t total = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        uint64_t tail = atomic_load_explicit(&ring_index(self, &ring, first + (uint64_t)i)[2],
                                             memory_order_relaxed);
        lengths[i] = (Py_ssize_t)(tail & UINT32_MAX);
        if (lengths[i] > ring.budget) {
            lengths[i] = -1; /* no writer wrote this: it counts as not whole */
        }
        else if (total <= ring.budget) {
            total += lengths[i];
        }
    }
    /* What is whole together fits the ring; more than that is lengths of different rounds. */
    if (total > ring.budget) {
        total = ring.budget;
    }
    PyObject *data = PyBytes_FromStringAndSize(NULL, ARRAY_HEADER + total);
    if (data == NULL) {
        PyMem_Free(lengths);
        return NULL;
    }
    unsigned char *start = (unsigned char *)PyBytes_AsString(data);
    Py_ssize_t used = 0;
    uint32_t entries = 0;
    uint64_t first_whole = first;
    for (Py_ssize_t i = 0; i < count; i++) {
        const uint64_t seq = first + (uint64_t)i;
        if (lengths[i] == 0) {
            continue;
        }
        if (lengths[i] > 0 && lengths[i] <= total - used
            && ring_take(self, &ring, seq, lengths[i], start + ARRAY_HEADER + used)) {
            used += lengths[i];
            entries++;
        }
        else {
            used = 0;
            entries = 0;
            first_whole = seq + 1;
        }
    }
    PyMem_Free(lengths);
    atomic_thread_fence(memory_order_acquire);
    start[0] = 0xdd;
    for (int byte = 0; byte < 4; byte++) {
        start[1 + byte] = (unsigned char)(entries >> (24 - 8 * byte));
    }
    if (used < total) {
        PyObject *shorter = PyBytes_FromStringAndSize((const char *)start, ARRAY_HEADER + used);
        Py_DECREF(data);
        data = shorter;
        if (data == NULL) {
            return NULL;
        }
    }
    return Py_BuildValue("KN", (unsigned long long)first_whole, data);
}

/* --- Memory: waiting ----------------------------------------------------------------------------
 *
 * An event is one word: a 32-bit count that is the futex, and a 32-bit flag that says that a waiter
 * may sleep on it. A waiter sets the flag before it sleeps and a waker takes it, so a killed sleeper
 * costs one superfluous wake call and nothing after that.
 */

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

static int64_t
monotonic_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* The same to a few milliseconds, for a fraction of the price. */
static int64_t
coarse_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* The point in time that a timeout in nanoseconds, or None, ends at. */
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

/* How long a sleep until `deadline` goes on before it looks again; 0 or below once it has passed.
 *
 * A signal may come just before a sleep, and then no system call is there for it to interrupt. Python
 * runs its handlers in the main thread, so that one looks after them more often. */
static int64_t
sleep_limit(int64_t deadline)
{
    const int64_t longest = getpid() == syscall(SYS_gettid) ? SIGNALS_NS : RECHECK_NS;
    if (deadline == INT64_MAX) {
        return longest;
    }
    const int64_t remaining = deadline - monotonic_ns();
    return remaining < longest ? remaining : longest;
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
    word_t *gate;
    Event *event;
} Wait;

static bool
wait_is_over(const Wait *wait)
{
    return atomic_load_explicit(wait->value, memory_order_acquire) > wait->above
           || atomic_load_explicit(wait->gate, memory_order_acquire) != 0;
}

/* Spins for as long as spinning has lately paid, and learns. Across cores the other side answers
 * while this one spins, and the budget grows; on one core it cannot answer until this one sleeps,
 * and the budget falls to nothing within a few waits. */
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
 * raises the count, then looks at the flag. All four are sequentially consistent, so at least one
 * side sees the other. */
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

/* wait_above(value, above, event, gate, timeout_ns) -> bool
 *
 * Blocks until the word at `value` is above `above` or the word at `gate` is not zero; False if
 * `timeout_ns` (None: no limit) passed first. Python's signal handlers run while it waits, also those
 * of a signal that came between the last look and the sleep, which no system call tells of. */
static PyObject *
memory_wait_above(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Memory *self = (Memory *)object;
    Py_ssize_t value, event, gate;
    Wait wait;
    if (!check_arity("wait_above", nargs, 5) || !parse_word(self, args[0], &value)
        || !as_u64(args[1], &wait.above) || !parse_word(self, args[2], &event)
        || !parse_word(self, args[3], &gate)) {
        return NULL;
    }
    int64_t deadline;
    if (!parse_timeout(args[4], &deadline)) {
        return NULL;
    }
    wait.value = word_at(self, value);
    wait.gate = word_at(self, gate);
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

/* wake(event) -> whether a waiter may have slept. Called after the store that they wait for. The
 * fence at the end orders it before whatever the caller looks at next (the bells). */
static PyObject *
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

static PyObject *memory_transitions(PyObject *object, PyObject *args, PyObject *kwargs);
static PyObject *memory_snapshots(PyObject *object, PyObject *const *args, Py_ssize_t nargs);
static PyMethodDef memory_methods[] = {
    {"private", (PyCFunction)memory_private, METH_O | METH_CLASS, NULL},
    {"detach", (PyCFunction)memory_detach, METH_NOARGS, NULL},
    {"reopen", (PyCFunction)memory_reopen, METH_O, NULL},
    {"load", (PyCFunction)memory_load, METH_O, NULL},
    {"store", (PyCFunction)(void (*)(void))memory_store, METH_FASTCALL, NULL},
    {"exchange", (PyCFunction)(void (*)(void))memory_exchange, METH_FASTCALL, NULL},
    {"fetch_add", (PyCFunction)(void (*)(void))memory_fetch_add, METH_FASTCALL, NULL},
    {"fetch_or", (PyCFunction)(void (*)(void))memory_fetch_or, METH_FASTCALL, NULL},
    {"load_column", (PyCFunction)(void (*)(void))memory_load_column, METH_FASTCALL, NULL},
    {"snapshots", (PyCFunction)(void (*)(void))memory_snapshots, METH_FASTCALL, NULL},
    {"find", (PyCFunction)(void (*)(void))memory_find, METH_FASTCALL, NULL},
    {"read", (PyCFunction)(void (*)(void))memory_read, METH_FASTCALL, NULL},
    {"write", (PyCFunction)(void (*)(void))memory_write, METH_FASTCALL, NULL},
    {"ring_put", (PyCFunction)(void (*)(void))memory_ring_put, METH_FASTCALL, NULL},
    {"ring_at", (PyCFunction)(void (*)(void))memory_ring_at, METH_FASTCALL, NULL},
    {"ring_gather", (PyCFunction)(void (*)(void))memory_ring_gather, METH_FASTCALL, NULL},
    {"wait_above", (PyCFunction)(void (*)(void))memory_wait_above, METH_FASTCALL, NULL},
    {"wake", (PyCFunction)memory_wake, METH_O, NULL},
    {"transitions", (PyCFunction)(void (*)(void))memory_transitions, METH_VARARGS | METH_KEYWORDS,
     NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot memory_slots[] = {
    {Py_tp_doc, "Memory(fd, size): the first `size` bytes of `fd`, mapped shared."},
    {Py_tp_new, memory_new},
    {Py_tp_dealloc, memory_dealloc},
    {Py_tp_methods, memory_methods},
    {Py_bf_getbuffer, memory_getbuffer},
    {Py_sq_length, memory_length},
    {0, NULL},
};

static PyType_Spec memory_spec = {
    .name = "shmepoch.memory._native.Memory",
    .basicsize = sizeof(Memory),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = memory_slots,
};

/* `on_closed` makes the error, since what it means to be closed is not known here. */
static void
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

/* --- Cell ------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    PyObject *memory; /* keeps the mapping alive */
    word_t *word;
    word_t *gate;
    PyObject *on_closed;
} Cell;

static PyObject *
cell_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"memory", "offset", "gate", "on_closed", NULL};
    PyObject *memory, *on_closed;
    Py_ssize_t offset, gate;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OnnO:Cell", keywords, &memory, &offset, &gate,
                                     &on_closed)) {
        return NULL;
    }
    ModuleState *state = PyType_GetModuleState(type);
    if (state == NULL) {
        return NULL;
    }
    if (!PyObject_TypeCheck(memory, state->memory_type)) {
        PyErr_SetString(PyExc_TypeError, "a Cell lies in a Memory");
        return NULL;
    }
    if (!check_word((Memory *)memory, offset) || !check_word((Memory *)memory, gate)) {
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Cell *self = (Cell *)allocate(type, 0);
    if (self != NULL) {
        Py_INCREF(memory);
        Py_INCREF(on_closed);
        self->memory = memory;
        self->word = word_at((Memory *)memory, offset);
        self->gate = word_at((Memory *)memory, gate);
        self->on_closed = on_closed;
    }
    return (PyObject *)self;
}

static int
cell_traverse(PyObject *object, visitproc visit, void *arg)
{
    Cell *self = (Cell *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->memory);
    Py_VISIT(self->on_closed);
    return 0;
}

/* Only what can be part of a cycle; the memory stays until the cell itself goes, so that a cell
 * that is used while its cycle is being collected still has a mapping under it. */
static int
cell_clear(PyObject *object)
{
    Py_CLEAR(((Cell *)object)->on_closed);
    return 0;
}

static void
cell_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    cell_clear(object);
    Py_CLEAR(((Cell *)object)->memory);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static bool
cell_is_open(Cell *self)
{
    if (atomic_load_explicit(self->gate, memory_order_acquire) == 0) {
        return true;
    }
    raise_closed(self->on_closed);
    return false;
}

static PyObject *
cell_load(PyObject *object, PyObject *const *Py_UNUSED(args), Py_ssize_t nargs)
{
    if (!check_arity("load", nargs, 0)) {
        return NULL;
    }
    return from_u64(
        atomic_load_explicit(((Cell *)object)->word, memory_order_acquire));
}

/* CURSOR-1: max(cell, value). Lock-free: an exchange fails only because another one succeeded.
 * Acquire-release, so that what this process did before it advanced is seen by every reader of the
 * new position. */
static PyObject *
cell_advance(PyObject *object, PyObject *value_object)
{
    Cell *self = (Cell *)object;
    uint64_t value;
    if (!as_u64(value_object, &value) || !cell_is_open(self)) {
        return NULL;
    }
    uint64_t current = atomic_load_explicit(self->word, memory_order_relaxed);
    while (current < value) {
        if (atomic_compare_exchange_weak_explicit(self->word, &current, value, memory_order_acq_rel,
                                                  memory_order_relaxed)) {
            Py_RETURN_TRUE;
        }
    }
    Py_RETURN_FALSE;
}

static PyObject *
cell_compare_and_swap(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Cell *self = (Cell *)object;
    uint64_t expected, value;
    if (!check_arity("compare_and_swap", nargs, 2) || !as_u64(args[0], &expected)
        || !as_u64(args[1], &value)) {
        return NULL;
    }
    if (value < expected) {
        return PyErr_Format(PyExc_ValueError,
                            "a cursor cannot move back from %llu to %llu; "
                            "pass a new value that is not below the expected one",
                            (unsigned long long)expected, (unsigned long long)value);
    }
    if (!cell_is_open(self)) {
        return NULL;
    }
    return bool_object(atomic_compare_exchange_strong_explicit(
        self->word, &expected, value, memory_order_acq_rel, memory_order_relaxed));
}

#ifdef SHMEPOCH_BENCH
/* What a call with one argument costs by itself: the floor that bench/ compares `advance` with. */
static PyObject *
cell_empty(PyObject *Py_UNUSED(object), PyObject *Py_UNUSED(value))
{
    Py_RETURN_NONE;
}
#endif

static PyMethodDef cell_methods[] = {
    {"load", (PyCFunction)(void (*)(void))cell_load, METH_FASTCALL, "The cell's value."},
    {"advance", (PyCFunction)cell_advance, METH_O,
     "Make the cell the larger of itself and a value; whether this call moved it."},
    {"compare_and_swap", (PyCFunction)(void (*)(void))cell_compare_and_swap, METH_FASTCALL,
     "Put a new value, not below the expected one, if the cell holds the expected one; whether it "
     "did."},
#ifdef SHMEPOCH_BENCH
    {"empty", (PyCFunction)cell_empty, METH_O, NULL},
#endif
    {NULL, NULL, 0, NULL},
};

static PyType_Slot cell_slots[] = {
    {Py_tp_doc, "One shared unsigned 64-bit word that never moves backwards."},
    {Py_tp_new, cell_new},
    {Py_tp_dealloc, cell_dealloc},
    {Py_tp_traverse, cell_traverse},
    {Py_tp_clear, cell_clear},
    {Py_tp_methods, cell_methods},
    {0, NULL},
};

static PyType_Spec cell_spec = {
    .name = "shmepoch.memory._native.Cell",
    .basicsize = sizeof(Cell),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = cell_slots,
};

/* --- Transitions --------------------------------------------------------------------------------
 *
 * The transitions that every operation goes through, each as one call, under the writer lock. They
 * do what the Python code of the registry does, store for store and in the same order, for the
 * common case only. In every other case (a sealed epoch, a transition that was broken off, words
 * that contradict each other, an operation that is not there or not in the right status, a full
 * table) they store nothing and return None, and the Python code decides.
 *
 * Each store of a word publishes what was written before it, so it is a release. Loads need no more
 * than relaxed: the writer lock orders them after the stores of its holders before.
 */

#define KEY_SIZE 16
#define VERSION_SHIFT 16
#define BUFFER_SHIFT 8
#define STATUS_MASK 3
#define SPARE_BITS 0xfefc /* of a slot's word: neither version, nor buffer, nor status */
#define FREE 0 /* a fingerprint, and the status, of a slot that holds nothing */
#define HINTS 256
/* The slot number of an entry whose operation no slot holds. */
#define NO_SLOT UINT32_MAX
/* Far above any feed, and far below where a position and what is added to it overflow. */
#define LAST_POSITION (UINT64_C(1) << 63)

typedef struct {
    PyObject_HEAD
    Memory *memory;
    Ring ring;
    /* words of the epoch */
    Py_ssize_t state, origin, skipped, watermark, dropped, intent, registrations, collected,
        reclaimed;
    /* slots, and the column of their fingerprints */
    Py_ssize_t fingerprints, slots, slots_at, slot_size;
    /* offsets within a slot */
    Py_ssize_t birth, terminal_seq, id, participant, created_ms, created_mono, elapsed_ms,
        spec_length, detail_length, watchers, lanes, spec, detail, detail_limit;
    Py_ssize_t max_operations, max_completed;
    /* Where operations were last found, by their fingerprints: looked at first, believed never. */
    uint32_t hints[HINTS];
} Transitions;

/* The words that commit, and what follows from them. */
typedef struct {
    uint64_t registrations, watermark, dropped, reclaimed;
    uint64_t floor;  /* operations that ended at or before this sequence are not retained */
    uint64_t active; /* operations that have not ended */
} Words;

static PyObject *
memory_transitions(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {
        "ring",         "state",        "origin",         "skipped",     "watermark",
        "dropped",      "intent",       "registrations",  "collected",   "reclaimed",
        "fingerprints", "slots",        "slots_at",       "slot_size",   "birth",
        "terminal_seq", "id",           "participant",    "created_ms",  "created_mono",
        "elapsed_ms",   "spec_length",  "detail_length",  "watchers",    "lanes",
        "spec",         "detail",       "detail_limit",   "max_operations", "max_completed", NULL};
    ModuleState *state = PyType_GetModuleState(Py_TYPE(object));
    if (state == NULL) {
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(state->transitions_type, Py_tp_alloc);
    Transitions *self = (Transitions *)allocate(state->transitions_type, 0);
    PyObject *ring;
    if (self == NULL) {
        return NULL;
    }
    self->memory = (Memory *)Py_NewRef(object);
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "$O" "nnnnnnnnn" "nnnn" "nnnnnnnnnnnnnn" "nn" ":transitions", keywords, &ring,
            &self->state, &self->origin, &self->skipped, &self->watermark, &self->dropped,
            &self->intent, &self->registrations, &self->collected, &self->reclaimed,
            &self->fingerprints, &self->slots, &self->slots_at, &self->slot_size, &self->birth,
            &self->terminal_seq, &self->id, &self->participant, &self->created_ms,
            &self->created_mono, &self->elapsed_ms, &self->spec_length, &self->detail_length,
            &self->watchers, &self->lanes, &self->spec, &self->detail, &self->detail_limit,
            &self->max_operations, &self->max_completed)
        || !parse_ring(self->memory, ring, &self->ring)) {
        Py_DECREF(self);
        return NULL;
    }
    const Py_ssize_t words[] = {self->state,     self->origin,        self->skipped,
                                self->skipped + WORD, self->watermark, self->dropped,
                                self->intent,    self->registrations, self->collected,
                                self->reclaimed};
    if (self->max_operations < 0 || self->max_completed < 0) {
        PyErr_SetString(PyExc_ValueError, "limits are 0 or above");
        Py_DECREF(self);
        return NULL;
    }
    bool inside = check_spans(self->memory, self->fingerprints, self->slots, WORD, WORD)
                  && check_spans(self->memory, self->slots_at, self->slots, self->slot_size,
                                 self->slot_size);
    for (size_t i = 0; inside && i < sizeof words / sizeof *words; i++) {
        inside = check_word(self->memory, words[i]);
    }
    /* A slot is checked like a memory of its size. */
    const Memory slot = {.size = self->slot_size};
    const Py_ssize_t fields[] = {self->birth,      self->terminal_seq, self->id,
                                 self->id + WORD,  self->participant,  self->created_ms,
                                 self->created_mono, self->elapsed_ms, self->spec_length,
                                 self->detail_length, self->detail_length + WORD};
    for (size_t i = 0; inside && i < sizeof fields / sizeof *fields; i++) {
        inside = check_word(&slot, fields[i]);
    }
    inside = inside && check_spans(&slot, self->watchers, 1, 0, self->spec - self->watchers)
             && check_spans(&slot, self->watchers, 1, self->lanes, self->lanes)
             && check_spans(&slot, self->spec, 1, 0, self->detail - self->spec)
             && check_spans(&slot, self->detail, 2, self->detail_limit, self->detail_limit);
    if (!inside) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void
transitions_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    Py_CLEAR(((Transitions *)object)->memory);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static uint64_t
word_of(const Transitions *self, Py_ssize_t offset)
{
    return atomic_load_explicit(word_at(self->memory, offset), memory_order_relaxed);
}

static void
publish(const Transitions *self, Py_ssize_t offset, uint64_t value)
{
    atomic_store_explicit(word_at(self->memory, offset), value, memory_order_release);
}

static Py_ssize_t
slot_at(const Transitions *self, Py_ssize_t index)
{
    return self->slots_at + index * self->slot_size;
}

/* Whether a transition may begin: the epoch is open, no other one was broken off, and no word is
 * beyond its bounds. */
static bool
load_words(const Transitions *self, Words *words)
{
    const uint64_t origin = word_of(self, self->origin), skipped_after = word_of(self, self->skipped),
                   skipped_through = word_of(self, self->skipped + WORD),
                   collected = word_of(self, self->collected),
                   capacity = (uint64_t)self->ring.capacity,
                   max_completed = (uint64_t)self->max_completed;
    if (word_of(self, self->state) != 0 || word_of(self, self->intent) != 0) {
        return false;
    }
    words->registrations = word_of(self, self->registrations);
    words->watermark = word_of(self, self->watermark);
    words->dropped = word_of(self, self->dropped);
    words->reclaimed = word_of(self, self->reclaimed);
    words->active = words->registrations - (words->watermark - origin);
    const uint64_t watermark = words->watermark;
    const uint64_t lowest = watermark > capacity ? watermark - capacity : 0;
    if (watermark >= LAST_POSITION || words->dropped < lowest || words->dropped > watermark
        || collected > watermark || words->reclaimed < lowest || words->reclaimed > watermark
        || words->active > (uint64_t)self->max_operations || origin > watermark
        || skipped_after > skipped_through || skipped_through > watermark) {
        return false;
    }
    uint64_t newest = watermark > max_completed ? watermark - max_completed : 0;
    if (newest < skipped_through) { /* what was skipped is no operation to be retained */
        const uint64_t skipped = skipped_through - skipped_after;
        newest = newest > skipped ? newest - skipped : 0;
    }
    words->floor = collected > words->dropped ? collected : words->dropped;
    words->floor = newest > words->floor ? newest : words->floor;
    return true;
}

static uint64_t
fingerprint_at(const Transitions *self, Py_ssize_t index)
{
    return word_of(self, self->fingerprints + index * WORD);
}

/* The first slot from `start` on that has this fingerprint, or -1. */
static Py_ssize_t
next_slot(const Transitions *self, uint64_t fingerprint, Py_ssize_t start)
{
    return find_word(self->memory, self->fingerprints, self->slots, WORD, fingerprint, start);
}

/* Whether a slot holds the operation with this id, as far as the registry does. */
static bool
holds(const Transitions *self, const Words *words, Py_ssize_t index, const uint64_t *id)
{
    const Py_ssize_t at = slot_at(self, index);
    const uint64_t birth = word_of(self, at + self->birth);
    const uint64_t ended = word_of(self, at + self->terminal_seq);
    return word_of(self, at + self->id) == id[0] && word_of(self, at + self->id + WORD) == id[1]
           && birth != 0 && birth <= words->registrations
           && (ended == 0 || ended > words->watermark || ended > words->floor);
}

/* The slot of the operation with this id that the registry holds, or -1. */
static Py_ssize_t
find_slot(Transitions *self, const Words *words, uint64_t fingerprint, const uint64_t *id)
{
    uint32_t *hint = &self->hints[fingerprint % HINTS];
    if ((Py_ssize_t)*hint < self->slots && fingerprint_at(self, *hint) == fingerprint
        && holds(self, words, *hint, id)) {
        return *hint;
    }
    Py_ssize_t index = next_slot(self, fingerprint, 0);
    while (index >= 0 && !holds(self, words, index, id)) {
        index = next_slot(self, fingerprint, index + 1);
    }
    if (index >= 0) {
        *hint = (uint32_t)index;
    }
    return index;
}

static uint64_t
next_word(uint64_t word, uint64_t status, uint64_t buffer)
{
    return ((word >> VERSION_SHIFT) + 1) << VERSION_SHIFT | buffer << BUFFER_SHIFT | status;
}

static bool
parse_id(PyObject *fingerprint, PyObject *id, uint64_t *parsed_fingerprint, uint64_t *parsed_id)
{
    char *bytes;
    Py_ssize_t length;
    if (!as_u64(fingerprint, parsed_fingerprint)
        || PyBytes_AsStringAndSize(id, &bytes, &length) < 0) {
        return false;
    }
    if (length != KEY_SIZE || *parsed_fingerprint == FREE) {
        PyErr_SetString(PyExc_ValueError, "an id has 16 bytes, and a fingerprint that is not 0");
        return false;
    }
    memcpy(parsed_id, bytes, KEY_SIZE);
    return true;
}

/* Whether the words of a slot that a transition reads are within their bounds. */
static bool
is_sound(const Transitions *self, Py_ssize_t at)
{
    const uint64_t limit = (uint64_t)self->detail_limit;
    return (word_of(self, at) & SPARE_BITS) == 0
           && word_of(self, at + self->created_ms) <= INT64_MAX
           && word_of(self, at + self->created_mono) <= INT64_MAX
           && word_of(self, at + self->detail_length) <= limit
           && word_of(self, at + self->detail_length + WORD) <= limit;
}

/* Whether the operation in a slot has a watcher. */
static bool
is_watched(const Transitions *self, Py_ssize_t at)
{
    for (Py_ssize_t lane = 0; lane < self->lanes; lane += WORD) {
        if (word_of(self, at + self->watchers + lane) != 0) {
            return true;
        }
    }
    return false;
}

/* Gives back the slots of operations that are not retained any more, nor watched (OPS-6). */
static bool
reclaim(const Transitions *self, const Words *words)
{
    for (uint64_t seq = words->reclaimed + 1; seq <= words->floor; seq++) {
        const uint64_t index =
            atomic_load_explicit(&ring_index(self->memory, &self->ring, seq)[2],
                                 memory_order_relaxed) >> LENGTH_BITS;
        if (index == NO_SLOT) {
            continue;
        }
        if (index >= (uint64_t)self->slots) {
            return false;
        }
        const Py_ssize_t at = slot_at(self, (Py_ssize_t)index);
        if (word_of(self, at + self->terminal_seq) == seq && !is_watched(self, at)) {
            publish(self, self->fingerprints + (Py_ssize_t)index * WORD, FREE);
        }
    }
    if (words->floor > words->reclaimed) {
        publish(self, self->reclaimed, words->floor);
    }
    return true;
}

/* An operation that is to be registered, and the slot that was found for it. */
typedef struct {
    uint64_t fingerprint, id[2];
    char *spec;
    Py_ssize_t length, slot;
} Entrant;

/* What is the same of all that are registered together. */
typedef struct {
    uint64_t participant, created_ms, created_mono, status, limit;
} Common;

static bool
parse_entrant(const Transitions *self, PyObject *fingerprint, PyObject *id, PyObject *spec,
              void *parsed)
{
    Entrant *entrant = parsed;
    if (!parse_id(fingerprint, id, &entrant->fingerprint, entrant->id)
        || PyBytes_AsStringAndSize(spec, &entrant->spec, &entrant->length) < 0) {
        return false;
    }
    if (entrant->length > self->detail - self->spec) {
        PyErr_SetString(PyExc_ValueError, "a spec that is no longer than its room");
        return false;
    }
    return true;
}

static bool
parse_common(PyObject *const *facts, PyObject *status, PyObject *limit, Common *common)
{
    if (!as_u64(facts[0], &common->participant) || !as_u64(facts[1], &common->created_ms)
        || !as_u64(facts[2], &common->created_mono) || !as_u64(status, &common->status)
        || !as_u64(limit, &common->limit)) {
        return false;
    }
    if (common->status == FREE || common->status > STATUS_MASK) {
        PyErr_SetString(PyExc_ValueError, "the status of an operation that has not ended");
        return false;
    }
    return true;
}

/* Finds a free slot for each; false if one of them is held already, or there is no room for all. */
static bool
find_places(Transitions *self, const Words *words, uint64_t limit, Entrant *entrants,
            Py_ssize_t count)
{
    const uint64_t active = words->active + (uint64_t)count;
    if (active > limit || active > (uint64_t)self->max_operations) {
        return false;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        if (find_slot(self, words, entrants[i].fingerprint, entrants[i].id) >= 0) {
            return false;
        }
    }
    if (!reclaim(self, words)) {
        return false;
    }
    Py_ssize_t slot = -1;
    for (Py_ssize_t i = 0; i < count; i++) {
        slot = next_slot(self, FREE, slot + 1);
        if (slot < 0) {
            return false;
        }
        entrants[i].slot = slot;
    }
    return true;
}

static void
fill_slot(const Transitions *self, const Entrant *entrant, const Common *common, uint64_t birth)
{
    const Py_ssize_t at = slot_at(self, entrant->slot);
    const uint64_t going = next_word(word_of(self, at), FREE, 0);
    publish(self, at, going); /* readers of what was here before see that it is going */
    atomic_thread_fence(memory_order_release);
    const struct {
        Py_ssize_t offset;
        uint64_t value;
    } fields[] = {
        {self->birth, birth},
        {self->terminal_seq, 0},
        {self->id, entrant->id[0]},
        {self->id + WORD, entrant->id[1]},
        {self->participant, common->participant},
        {self->created_ms, common->created_ms},
        {self->created_mono, common->created_mono},
        {self->elapsed_ms, 0},
        {self->spec_length, (uint64_t)entrant->length},
        {self->detail_length, 0},
        {self->detail_length + WORD, 0},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        atomic_store_explicit(word_at(self->memory, at + fields[i].offset), fields[i].value,
                              memory_order_relaxed);
    }
    for (Py_ssize_t lane = self->watchers; lane < self->spec; lane += WORD) {
        atomic_store_explicit(word_at(self->memory, at + lane), 0, memory_order_relaxed);
    }
    copy_in(self->memory, at + self->spec, (const unsigned char *)entrant->spec, entrant->length);
    publish(self, self->fingerprints + entrant->slot * WORD, entrant->fingerprint);
    publish(self, at, next_word(going, common->status, 0));
}

/* Registers all of them in one commit; the first one's number, or None. */
static PyObject *
enter(Transitions *self, Entrant *entrants, Py_ssize_t count, const Common *common)
{
    Words words;
    if (!load_words(self, &words) || !find_places(self, &words, common->limit, entrants, count)) {
        Py_RETURN_NONE;
    }
    publish(self, self->intent, 1);
    for (Py_ssize_t i = 0; i < count; i++) {
        fill_slot(self, &entrants[i], common, words.registrations + 1 + (uint64_t)i);
        self->hints[entrants[i].fingerprint % HINTS] = (uint32_t)entrants[i].slot;
    }
    publish(self, self->registrations, words.registrations + (uint64_t)count);
    publish(self, self->intent, 0);
    return from_u64(words.registrations + 1);
}

/* register(fingerprint, id, participant, created_ms, created_mono, spec, status, limit)
 *
 * Enters an operation in a free slot; its registration's number. */
static PyObject *
transitions_register(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Transitions *self = (Transitions *)object;
    Entrant entrant;
    Common common;
    if (!check_arity("register", nargs, 8)
        || !parse_entrant(self, args[0], args[1], args[5], &entrant)
        || !parse_common(&args[2], args[6], args[7], &common)) {
        return NULL;
    }
    return enter(self, &entrant, 1, &common);
}

/* What `parse` makes, of `size` bytes, of each of a tuple's tuples of three, to be freed; NULL with an
 * error set. It may point into what the tuples hold. */
static void *
parse_each(const Transitions *self, PyObject *tuple, size_t size,
           bool (*parse)(const Transitions *, PyObject *, PyObject *, PyObject *, void *))
{
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, "a tuple of tuples");
        return NULL;
    }
    const Py_ssize_t count = PyTuple_Size(tuple);
    char *parsed = PyMem_Calloc((size_t)count, size);
    if (parsed == NULL) {
        return PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *each = PyTuple_GetItem(tuple, i);
        if (!PyTuple_Check(each) || PyTuple_Size(each) != 3) {
            PyErr_SetString(PyExc_TypeError, "a tuple of tuples of three");
        } else if (parse(self, PyTuple_GetItem(each, 0), PyTuple_GetItem(each, 1),
                         PyTuple_GetItem(each, 2), parsed + (size_t)i * size)) {
            continue;
        }
        PyMem_Free(parsed);
        return NULL;
    }
    return parsed;
}

/* register_all(((fingerprint, id, spec), ...), participant, created_ms, created_mono, status, limit)
 *
 * The same for several with different ids; the first one's number. */
static PyObject *
transitions_register_all(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Transitions *self = (Transitions *)object;
    Common common;
    if (!check_arity("register_all", nargs, 6) || !parse_common(&args[1], args[4], args[5], &common)) {
        return NULL;
    }
    Entrant *entrants = parse_each(self, args[0], sizeof *entrants, parse_entrant);
    if (entrants == NULL) {
        return NULL;
    }
    PyObject *entered = enter(self, entrants, PyTuple_Size(args[0]), &common);
    PyMem_Free(entrants);
    return entered;
}

/* start(fingerprint, id, status, started_status, started_ms, detail) -> True
 *
 * Gives an operation of this status, of which nothing has changed since it was registered, another
 * status and its first detail; not where the clock stands before its registration. */
static PyObject *
transitions_start(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Transitions *self = (Transitions *)object;
    uint64_t fingerprint, id[2], status, started_status, started_ms;
    char *detail;
    Py_ssize_t length;
    Words words;
    if (!check_arity("start", nargs, 6) || !parse_id(args[0], args[1], &fingerprint, id)
        || !as_u64(args[2], &status) || !as_u64(args[3], &started_status)
        || !as_u64(args[4], &started_ms)
        || PyBytes_AsStringAndSize(args[5], &detail, &length) < 0) {
        return NULL;
    }
    if (length > self->detail_limit || status > STATUS_MASK || started_status > STATUS_MASK) {
        PyErr_SetString(PyExc_ValueError, "a detail that is no longer than its room, and statuses");
        return NULL;
    }
    const Py_ssize_t index =
        load_words(self, &words) ? find_slot(self, &words, fingerprint, id) : -1;
    if (index < 0) {
        Py_RETURN_NONE;
    }
    const Py_ssize_t at = slot_at(self, index);
    const uint64_t word = word_of(self, at), ended = word_of(self, at + self->terminal_seq);
    const uint64_t buffer = word >> BUFFER_SHIFT & 1;
    if (ended != 0 || !is_sound(self, at) || (word & STATUS_MASK) != status
        || word_of(self, at + self->detail_length + (Py_ssize_t)buffer * WORD) != 0
        || word_of(self, at + self->created_ms) > started_ms) {
        Py_RETURN_NONE;
    }
    const Py_ssize_t other = (Py_ssize_t)(buffer ^ 1);
    atomic_thread_fence(memory_order_release);
    copy_in(self->memory, at + self->detail + other * self->detail_limit,
            (const unsigned char *)detail, length);
    publish(self, at + self->detail_length + other * WORD, (uint64_t)length);
    publish(self, at, next_word(word, started_status, (uint64_t)other));
    Py_RETURN_TRUE;
}

/* look(fingerprint, id, statuses) -> (seq, slot, birth, created_ms, created_mono, detail)
 *
 * An operation that has not ended and whose status is one of a set of bits, as it has to be known to
 * end it, and the sequence that this would have. */
static PyObject *
transitions_look(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Transitions *self = (Transitions *)object;
    uint64_t fingerprint, id[2], statuses;
    Words words;
    if (!check_arity("look", nargs, 3) || !parse_id(args[0], args[1], &fingerprint, id)
        || !as_u64(args[2], &statuses)) {
        return NULL;
    }
    const Py_ssize_t index =
        load_words(self, &words) ? find_slot(self, &words, fingerprint, id) : -1;
    if (index < 0) {
        Py_RETURN_NONE;
    }
    const Py_ssize_t at = slot_at(self, index);
    const uint64_t word = word_of(self, at), buffer = word >> BUFFER_SHIFT & 1;
    const uint64_t length = word_of(self, at + self->detail_length + (Py_ssize_t)buffer * WORD);
    if (word_of(self, at + self->terminal_seq) != 0 || !is_sound(self, at)
        || (statuses >> (word & STATUS_MASK) & 1) == 0) {
        Py_RETURN_NONE;
    }
    PyObject *detail = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
    if (detail == NULL) {
        return NULL;
    }
    copy_out(self->memory, at + self->detail + (Py_ssize_t)buffer * self->detail_limit,
             (unsigned char *)PyBytes_AsString(detail), (Py_ssize_t)length);
    return Py_BuildValue("KnKKKN", (unsigned long long)words.watermark + 1, index,
                         (unsigned long long)word_of(self, at + self->birth),
                         (unsigned long long)word_of(self, at + self->created_ms),
                         (unsigned long long)word_of(self, at + self->created_mono), detail);
}

/* An operation that is to end, and the entry that says how. */
typedef struct {
    uint64_t slot, elapsed_ms;
    char *data;
    Py_ssize_t length;
} Ending;

static bool
parse_ending(const Transitions *self, PyObject *slot, PyObject *elapsed_ms, PyObject *data,
             void *parsed)
{
    Ending *ending = parsed;
    if (!as_u64(slot, &ending->slot) || !as_u64(elapsed_ms, &ending->elapsed_ms)
        || PyBytes_AsStringAndSize(data, &ending->data, &ending->length) < 0) {
        return false;
    }
    if (ending->slot >= (uint64_t)self->slots) {
        PyErr_Format(PyExc_IndexError, "no slot %llu: there are %zd",
                     (unsigned long long)ending->slot, self->slots);
        return false;
    }
    return true;
}

/* Whether a watcher still waits for an outcome that only an entry above the first sequence and
 * through the second has. */
static bool
is_any_watched(const Transitions *self, uint64_t after, uint64_t through)
{
    for (uint64_t seq = after + 1; seq <= through; seq++) {
        const uint64_t index =
            atomic_load_explicit(&ring_index(self->memory, &self->ring, seq)[2],
                                 memory_order_relaxed) >> LENGTH_BITS;
        if (index < (uint64_t)self->slots) {
            const Py_ssize_t at = slot_at(self, (Py_ssize_t)index);
            if (word_of(self, at + self->terminal_seq) == seq && is_watched(self, at)) {
                return true;
            }
        }
    }
    return false;
}

/* Where the entries of all of them begin, after the watermark, and through which sequence older ones
 * have to be dropped for them; false if the ring cannot hold them together, or if a watcher waits
 * for what would be dropped. */
static bool
find_room(const Transitions *self, const Words *words, const Ending *endings, Py_ssize_t count,
          uint64_t *position, uint64_t *dropped)
{
    const Ring *ring = &self->ring;
    const word_t *last = ring_index(self->memory, ring, words->watermark);
    const uint64_t begin = atomic_load_explicit(&last[0], memory_order_relaxed);
    const uint64_t before = atomic_load_explicit(&last[2], memory_order_relaxed) & UINT32_MAX;
    const uint64_t watermark = words->watermark, through = watermark + (uint64_t)count;
    Py_ssize_t size = 0;
    if (begin % WORD != 0 || begin > LAST_POSITION || before > (uint64_t)ring->budget
        || count > ring->capacity) {
        return false;
    }
    *position = begin + (uint64_t)padded((Py_ssize_t)before);
    uint64_t end = *position;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (endings[i].length + WORD > ring->budget - size) {
            return false;
        }
        size += endings[i].length + WORD;
        end += (uint64_t)padded(endings[i].length);
    }
    *dropped = words->dropped;
    if (through - *dropped > (uint64_t)ring->capacity) {
        *dropped = through - (uint64_t)ring->capacity;
    }
    if (is_any_watched(self, words->dropped, *dropped)) {
        return false;
    }
    for (; *dropped < watermark; ++*dropped) {
        const uint64_t oldest = atomic_load_explicit(
            &ring_index(self->memory, ring, *dropped + 1)[0], memory_order_relaxed);
        if (oldest > *position) {
            return false;
        }
        if (oldest + (uint64_t)ring->budget >= end) {
            break;
        }
        if (is_any_watched(self, *dropped, *dropped + 1)) {
            return false;
        }
    }
    return true;
}

/* Appends the entries from sequence `first` on, and ends their operations in one commit; True, or
 * None. */
static PyObject *
end_together(const Transitions *self, uint64_t first, const Ending *endings, Py_ssize_t count)
{
    uint64_t position, dropped;
    Words words;
    if (!load_words(self, &words) || first != words.watermark + 1
        || !find_room(self, &words, endings, count, &position, &dropped)) {
        Py_RETURN_NONE;
    }
    if (dropped > words.dropped) {
        publish(self, self->dropped, dropped);
    }
    publish(self, self->intent, 1);
    for (Py_ssize_t i = 0; i < count; i++) {
        const Ending *ending = &endings[i];
        const Py_ssize_t at = slot_at(self, (Py_ssize_t)ending->slot);
        const uint64_t seq = first + (uint64_t)i;
        ring_write(self->memory, &self->ring, seq, position, ending->data, ending->length,
                   ending->slot);
        position += (uint64_t)padded(ending->length);
        publish(self, at + self->elapsed_ms, ending->elapsed_ms);
        publish(self, at + self->terminal_seq, seq);
    }
    publish(self, self->watermark, words.watermark + (uint64_t)count);
    publish(self, self->intent, 0);
    Py_RETURN_TRUE;
}

/* end(seq, slot, elapsed_ms, data) -> True
 *
 * Appends an entry that was made with what `look` said, and ends the operation with it. */
static PyObject *
transitions_end(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    const Transitions *self = (const Transitions *)object;
    uint64_t seq;
    Ending ending;
    if (!check_arity("end", nargs, 4) || !as_u64(args[0], &seq)
        || !parse_ending(self, args[1], args[2], args[3], &ending)) {
        return NULL;
    }
    return end_together(self, seq, &ending, 1);
}

/* end_all(first, ((slot, elapsed_ms, data), ...)) -> True
 *
 * The same for several with different slots, the entry of the first at sequence `first`. */
static PyObject *
transitions_end_all(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    const Transitions *self = (const Transitions *)object;
    uint64_t first;
    if (!check_arity("end_all", nargs, 2) || !as_u64(args[0], &first)) {
        return NULL;
    }
    Ending *endings = parse_each(self, args[1], sizeof *endings, parse_ending);
    if (endings == NULL) {
        return NULL;
    }
    PyObject *ended = end_together(self, first, endings, PyTuple_Size(args[1]));
    PyMem_Free(endings);
    return ended;
}

static PyMethodDef transitions_methods[] = {
    {"register", (PyCFunction)(void (*)(void))transitions_register, METH_FASTCALL, NULL},
    {"register_all", (PyCFunction)(void (*)(void))transitions_register_all, METH_FASTCALL, NULL},
    {"start", (PyCFunction)(void (*)(void))transitions_start, METH_FASTCALL, NULL},
    {"look", (PyCFunction)(void (*)(void))transitions_look, METH_FASTCALL, NULL},
    {"end", (PyCFunction)(void (*)(void))transitions_end, METH_FASTCALL, NULL},
    {"end_all", (PyCFunction)(void (*)(void))transitions_end_all, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot transitions_slots[] = {
    {Py_tp_doc, "Made by Memory.transitions: see _native.pyi."},
    {Py_tp_dealloc, transitions_dealloc},
    {Py_tp_methods, transitions_methods},
    {0, NULL},
};

static PyType_Spec transitions_spec = {
    .name = "shmepoch.memory._native.Transitions",
    .basicsize = sizeof(Transitions),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = transitions_slots,
};

/* --- Snapshots -------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    Memory *memory;
    PyObject *make; /* what a snapshot becomes, of its words */
    Py_ssize_t offset, count, stride;
    /* The last one made, which is immutable and serves until a word has moved. Not without the
     * interpreter lock: two threads would exchange it. */
    PyObject *last;
    uint64_t last_words[SNAPSHOT_MAX];
} Snapshots;

/* snapshots(offset, count, stride, make) -> Snapshots, whose `take` has its arguments parsed and
 * checked already; `make` makes something immutable */
static PyObject *
memory_snapshots(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t offset, count, stride;
    ModuleState *state = PyType_GetModuleState(Py_TYPE(object));
    if (state == NULL || !check_arity("snapshots", nargs, 4)
        || !parse_column(object, "snapshots", args, 3, &offset, &count, &stride)) {
        return NULL;
    }
    if (count > SNAPSHOT_MAX) {
        return PyErr_Format(PyExc_ValueError, "a snapshot covers at most %d words, not %zd",
                            SNAPSHOT_MAX, count);
    }
    if (!PyCallable_Check(args[3])) {
        PyErr_SetString(PyExc_TypeError, "make is called with the words of each snapshot");
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(state->snapshots_type, Py_tp_alloc);
    Snapshots *self = (Snapshots *)allocate(state->snapshots_type, 0);
    if (self != NULL) {
        self->memory = (Memory *)Py_NewRef(object);
        self->make = Py_NewRef(args[3]);
        self->offset = offset;
        self->count = count;
        self->stride = stride;
    }
    return (PyObject *)self;
}

static int
snapshots_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(((Snapshots *)object)->make);
    Py_VISIT(((Snapshots *)object)->last);
    return 0;
}

/* The memory stays until the object itself goes, as a Cell's does. */
static int
snapshots_clear(PyObject *object)
{
    Py_CLEAR(((Snapshots *)object)->make);
    Py_CLEAR(((Snapshots *)object)->last);
    return 0;
}

static void
snapshots_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    snapshots_clear(object);
    Py_CLEAR(((Snapshots *)object)->memory);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyObject *
snapshots_take(PyObject *object, PyObject *const *Py_UNUSED(args), Py_ssize_t nargs)
{
    Snapshots *self = (Snapshots *)object;
    uint64_t words[SNAPSHOT_MAX] = {0};
    PyObject *values[SNAPSHOT_MAX] = {NULL}, *made = NULL;
    if (!check_arity("take", nargs, 0)) {
        return NULL;
    }
    if (self->make == NULL) { /* it is being collected */
        PyErr_SetString(PyExc_RuntimeError, "nothing makes these snapshots any more");
        return NULL;
    }
    load_at_once(self->memory, self->offset, self->count, self->stride, words);
    if (self->last != NULL && memcmp(words, self->last_words, sizeof words) == 0) {
        return Py_NewRef(self->last);
    }
    bool whole = true;
    for (Py_ssize_t i = 0; whole && i < self->count; i++) {
        values[i] = from_u64(words[i]);
        whole = values[i] != NULL;
    }
    if (whole) { /* the arguments end with the first that is NULL */
        made = PyObject_CallFunctionObjArgs(self->make, values[0], values[1], values[2], values[3],
                                            values[4], values[5], values[6], values[7], NULL);
    }
    for (Py_ssize_t i = 0; i < self->count; i++) {
        Py_XDECREF(values[i]);
    }
#ifndef Py_GIL_DISABLED
    if (made != NULL) {
        PyObject *before = self->last;
        self->last = Py_NewRef(made);
        memcpy(self->last_words, words, sizeof words);
        Py_XDECREF(before);
    }
#endif
    return made;
}

static PyMethodDef snapshots_methods[] = {
    {"take", (PyCFunction)(void (*)(void))snapshots_take, METH_FASTCALL,
     "The words as they stand at one instant, made into a record."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot snapshots_slots[] = {
    {Py_tp_doc, "Made by Memory.snapshots: see _native.pyi."},
    {Py_tp_dealloc, snapshots_dealloc},
    {Py_tp_traverse, snapshots_traverse},
    {Py_tp_clear, snapshots_clear},
    {Py_tp_methods, snapshots_methods},
    {0, NULL},
};

static PyType_Spec snapshots_spec = {
    .name = "shmepoch.memory._native.Snapshots",
    .basicsize = sizeof(Snapshots),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE
             | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = snapshots_slots,
};

/* --- open-file-description locks ------------------------------------------------------------------
 *
 * They belong to the open file description, not to the process (fcntl(2)): two attachments of one
 * process exclude each other, and the kernel drops them with the last descriptor, however its
 * holder died.
 */

static struct flock
byte_lock(short type, off_t at)
{
    struct flock lock;
    memset(&lock, 0, sizeof lock); /* l_pid must be zero for the F_OFD commands */
    lock.l_type = type;
    lock.l_whence = SEEK_SET;
    lock.l_start = at;
    lock.l_len = 1;
    return lock;
}

static bool
parse_lock(PyObject *const *args, int *fd, off_t *at)
{
    if (!parse_descriptor(args[0], fd)) {
        return false;
    }
    long long start = PyLong_AsLongLong(args[1]);
    if (PyErr_Occurred()) {
        return false;
    }
    if (start < 0) {
        PyErr_Format(PyExc_ValueError, "no byte %lld of descriptor %d", start, *fd);
        return false;
    }
    *at = (off_t)start;
    return true;
}

/* try_lock(fd, byte, shared) -> whether the lock is now held through this description */
static PyObject *
native_try_lock(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    int fd;
    off_t at;
    if (!check_arity("try_lock", nargs, 3) || !parse_lock(args, &fd, &at)) {
        return NULL;
    }
    int shared = PyObject_IsTrue(args[2]);
    if (shared < 0) {
        return NULL;
    }
    struct flock lock = byte_lock(shared ? F_RDLCK : F_WRLCK, at);
    if (fcntl(fd, F_OFD_SETLK, &lock) == 0) {
        Py_RETURN_TRUE;
    }
    if (errno == EAGAIN || errno == EACCES) {
        Py_RETURN_FALSE;
    }
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* unlock(fd, byte) */
static PyObject *
native_unlock(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    int fd;
    off_t at;
    if (!check_arity("unlock", nargs, 2) || !parse_lock(args, &fd, &at)) {
        return NULL;
    }
    struct flock lock = byte_lock(F_UNLCK, at);
    if (fcntl(fd, F_OFD_SETLK, &lock) != 0) {
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

/* is_locked(fd, byte) -> whether another description holds a lock on the byte */
static PyObject *
native_is_locked(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    int fd;
    off_t at;
    if (!check_arity("is_locked", nargs, 2) || !parse_lock(args, &fd, &at)) {
        return NULL;
    }
    struct flock lock = byte_lock(F_WRLCK, at);
    if (fcntl(fd, F_OFD_GETLK, &lock) != 0) {
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return bool_object(lock.l_type != F_UNLCK);
}

/* --- Descriptor ---------------------------------------------------------------------------------
 *
 * A descriptor carries every lock that was taken through it, and a death is noticed by those locks. So
 * no descriptor may be left over, whatever a signal handler raises, and no forked child may keep one
 * of its parent's, whatever another thread of the parent was doing. Both ask for the same: from the
 * system call on that opens it, a descriptor has an object that closes it, and the objects of all that
 * are open are known. Its number is nowhere else, so none outlives it.
 *
 * LOCK-1: a mapping holds the open file description it was made through, and with it every lock, for
 * as long as the memory is there. So what closes gives its locks up by name. A forked child, which must
 * not do that to its parent, has the memory mapped anew.
 */

struct Descriptor {
    PyObject_HEAD
    int fd;               /* -1: closed */
    unsigned long forks;  /* by which the process that opened it is known */
    bool inherited;       /* closed because it was the parent's */
    Memory *memory;       /* what was mapped through the same description, or NULL */
    PyObject *on_closed;  /* makes the error of a closed one, or NULL */
    Descriptor *next;     /* among the open ones */
    Descriptor **link;    /* what points to this one there */
};

/* Held for a few instructions and over a fork, so that a child finds the list whole; where there is a
 * global interpreter lock, that one does as much. */
static pthread_mutex_t descriptors_lock = PTHREAD_MUTEX_INITIALIZER;
/* How many forks lie between the first process and this one: a PID may come again in a container. */
static _Atomic unsigned long forks;

static void
before_fork(void)
{
    pthread_mutex_lock(&descriptors_lock);
}

static void
after_fork_in_parent(void)
{
    pthread_mutex_unlock(&descriptors_lock);
}

static void
after_fork_in_child(void)
{
    atomic_fetch_add_explicit(&forks, 1, memory_order_relaxed); /* there is one thread */
    pthread_mutex_unlock(&descriptors_lock);
}

static void
watch_forks(void)
{
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

static void
descriptor_enlist(Descriptor *self)
{
    ModuleState *state = PyType_GetModuleState(Py_TYPE((PyObject *)self));
    pthread_mutex_lock(&descriptors_lock);
    self->link = &state->descriptors;
    self->next = state->descriptors;
    if (self->next != NULL) {
        self->next->link = &self->next;
    }
    state->descriptors = self;
    pthread_mutex_unlock(&descriptors_lock);
}

static void
descriptor_delist(Descriptor *self)
{
    pthread_mutex_lock(&descriptors_lock);
    if (self->link != NULL) {
        *self->link = self->next;
        if (self->next != NULL) {
            self->next->link = self->link;
        }
    }
    self->link = NULL;
    self->next = NULL;
    pthread_mutex_unlock(&descriptors_lock);
}

static bool
descriptor_is_inherited(const Descriptor *self)
{
    return self->forks != atomic_load_explicit(&forks, memory_order_relaxed);
}

/* Without a descriptor yet, so that nothing can fail once there is one. */
static Descriptor *
descriptor_make(PyTypeObject *type)
{
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Descriptor *self = (Descriptor *)allocate(type, 0);
    if (self != NULL) {
        self->fd = -1;
        self->forks = atomic_load_explicit(&forks, memory_order_relaxed);
    }
    return self;
}

static void
descriptor_own(Descriptor *self, int fd)
{
    self->fd = fd;
    descriptor_enlist(self);
}

/* False with an error set where a forked child could not map the memory anew, and so keeps the locks
 * of its parent. It is closed in any case. */
static bool
descriptor_release(Descriptor *self)
{
    const int fd = self->fd;
    if (fd < 0) {
        return true;
    }
    bool left = true;
    descriptor_delist(self);
    self->fd = -1;
    if (!descriptor_is_inherited(self)) {
        struct flock every = byte_lock(F_UNLCK, 0);
        every.l_len = 0; /* to the end, as fcntl(2) has it */
        fcntl(fd, F_OFD_SETLK, &every);
    } else {
        self->inherited = true;
        left = self->memory == NULL || map_again(self->memory, fd);
    }
    close(fd);
    Memory *memory = self->memory;
    self->memory = NULL;
    Py_XDECREF((PyObject *)memory);
    return left;
}

static int
descriptor_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(((Descriptor *)object)->on_closed);
    return 0;
}

static int
descriptor_clear(PyObject *object)
{
    Py_CLEAR(((Descriptor *)object)->on_closed);
    return 0;
}

static void
descriptor_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    PyObject *kind, *value, *traceback;
    PyErr_Fetch(&kind, &value, &traceback);
    if (!descriptor_release((Descriptor *)object)) {
        PyErr_WriteUnraisable((PyObject *)type);
    }
    PyErr_Restore(kind, value, traceback);
    descriptor_clear(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

/* open(path, flags, mode=0o600): like os.open, and closed on exec. The interpreter lock is kept: where
 * shared memory lies, this waits for nothing. */
static PyObject *
descriptor_open(PyObject *type, PyObject *args)
{
    PyObject *path, *name = NULL;
    int flags, mode = 0600;
    if (!PyArg_ParseTuple(args, "Oi|i:open", &path, &flags, &mode)
        || !PyUnicode_FSConverter(path, &name)) {
        return NULL;
    }
    Descriptor *self = descriptor_make((PyTypeObject *)type);
    if (self != NULL) {
        int fd = open(PyBytes_AsString(name), flags | O_CLOEXEC, (mode_t)mode);
        if (fd >= 0) {
            descriptor_own(self, fd);
        } else {
            PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path);
            Py_CLEAR(self);
        }
    }
    Py_DECREF(name);
    return (PyObject *)self;
}

/* Whether the file of `fd` now has the byte's shared lock, and is what it was to be. What it is, is
 * looked up after the lock was asked for: its holder knows that it is so still. */
static bool
hold(int fd, off_t at, mode_t mode, Py_ssize_t length, struct stat *found)
{
    struct flock lock = byte_lock(F_RDLCK, at);
    return fcntl(fd, F_OFD_SETLK, &lock) == 0 && fstat(fd, found) == 0 && found->st_mode == mode
           && found->st_uid == geteuid() && found->st_nlink > 0 && found->st_size >= length;
}

/* open_held(path, byte, mode, length, mapped) -> (descriptor, size, first bytes, memory), or None
 *
 * Opens, locks, checks, reads and maps a file in one call, where all is in order. Where anything is not,
 * nothing stays open, and the caller goes about it step by step. The memory, None unless `mapped`, is
 * mapped through the description of the descriptor: another one would take a seventh of an attach. The
 * bytes are read and not looked at through the mapping, whose first touch takes longer.
 */
static PyObject *
descriptor_open_held(PyObject *type, PyObject *const *args, Py_ssize_t nargs)
{
    PyObject *name = NULL, *bytes = NULL, *opened = NULL;
    if (!check_arity("open_held", nargs, 5)) {
        return NULL;
    }
    long long at = PyLong_AsLongLong(args[1]);
    unsigned long mode = PyLong_AsUnsignedLong(args[2]);
    Py_ssize_t length = PyLong_AsSsize_t(args[3]);
    int mapped = PyObject_IsTrue(args[4]);
    if (PyErr_Occurred() || !PyUnicode_FSConverter(args[0], &name)) {
        return NULL;
    }
    if (at < 0 || length < 0) {
        Py_DECREF(name);
        return PyErr_Format(PyExc_ValueError, "no byte %lld or first %zd bytes of a file", at,
                            length);
    }
    ModuleState *state = PyType_GetModuleState((PyTypeObject *)type);
    Descriptor *self = descriptor_make((PyTypeObject *)type);
    int fd = self == NULL ? -1 : open(PyBytes_AsString(name), O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    struct stat found;
    if (fd >= 0) {
        descriptor_own(self, fd);
        if (hold(fd, (off_t)at, (mode_t)mode, length, &found)) {
            bytes = PyBytes_FromStringAndSize(NULL, length);
            if (bytes != NULL && mapped) {
                self->memory = (Memory *)memory_map(state->memory_type, fd,
                                                    (Py_ssize_t)found.st_size, MAP_SHARED);
            }
            if (bytes != NULL && (self->memory != NULL) == mapped
                && pread(fd, PyBytes_AsString(bytes), (size_t)length, 0) == length) {
                opened = Py_BuildValue("OnOO", (PyObject *)self, (Py_ssize_t)found.st_size, bytes,
                                       mapped ? (PyObject *)self->memory : Py_None);
            }
        }
    }
    Py_XDECREF(bytes);
    Py_DECREF(name);
    Py_XDECREF((PyObject *)self); /* which closes it, unless it is in `opened` */
    if (opened != NULL) {
        return opened;
    }
    PyErr_Clear(); /* of what could not be mapped: the caller finds out why */
    Py_RETURN_NONE;
}

static PyObject *
descriptor_fileno(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    const Descriptor *self = (const Descriptor *)object;
    if (self->fd < 0) {
        raise_closed(self->on_closed);
        return NULL;
    }
    return PyLong_FromLong(self->fd);
}

/* close(on_closed=None): of no effect on a closed one. */
static PyObject *
descriptor_close(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Descriptor *self = (Descriptor *)object;
    if (nargs > 1) {
        return PyErr_Format(PyExc_TypeError, "close takes at most 1 argument, not %zd", nargs);
    }
    PyObject *before = self->on_closed;
    if (nargs == 1 && args[0] != Py_None) {
        if (!PyCallable_Check(args[0])) {
            PyErr_SetString(PyExc_TypeError, "on_closed is called to make the error");
            return NULL;
        }
        self->on_closed = Py_NewRef(args[0]);
        Py_XDECREF(before);
    }
    self->inherited = false; /* a child that closes what it inherited is not to open it again */
    if (!descriptor_release(self)) {
        return NULL;
    }
    Py_RETURN_NONE;
}

/* take(other) -> whether this one, which was closed, is now what `other` was, and `other` is closed. */
static PyObject *
descriptor_take(PyObject *object, PyObject *other_object)
{
    Descriptor *self = (Descriptor *)object, *other = (Descriptor *)other_object;
    if (!Py_IS_TYPE(other_object, Py_TYPE(object))) {
        PyErr_SetString(PyExc_TypeError, "a descriptor takes over another descriptor");
        return NULL;
    }
    if (self->fd >= 0 || other->fd < 0) {
        Py_RETURN_FALSE;
    }
    descriptor_delist(other);
    self->memory = other->memory;
    self->forks = other->forks;
    self->inherited = false;
    descriptor_own(self, other->fd);
    other->fd = -1;
    other->memory = NULL;
    Py_CLEAR(self->on_closed);
    Py_RETURN_TRUE;
}

static PyObject *
descriptor_get_closed(PyObject *object, void *Py_UNUSED(closure))
{
    return bool_object(((Descriptor *)object)->fd < 0);
}

static PyObject *
descriptor_get_inherited(PyObject *object, void *Py_UNUSED(closure))
{
    return bool_object(((Descriptor *)object)->inherited);
}

/* leave_inherited(): in a forked child, close every descriptor of the parent. Raises the error of the
 * first whose memory could not be mapped anew, after all of them. */
static PyObject *
native_leave_inherited(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    ModuleState *state = PyModule_GetState(module);
    bool left = true;
    for (;;) {
        pthread_mutex_lock(&descriptors_lock);
        Descriptor *found = state->descriptors;
        while (found != NULL && !descriptor_is_inherited(found)) {
            found = found->next;
        }
        Py_XINCREF((PyObject *)found);
        pthread_mutex_unlock(&descriptors_lock);
        if (found == NULL) {
            break;
        }
        PyObject *kind, *value, *traceback;
        PyErr_Fetch(&kind, &value, &traceback);
        left = descriptor_release(found) && left;
        if (kind != NULL) {
            PyErr_Restore(kind, value, traceback);
        }
        Py_DECREF((PyObject *)found);
    }
    return left ? Py_NewRef(Py_None) : NULL;
}

static PyMethodDef descriptor_methods[] = {
    {"open", (PyCFunction)descriptor_open, METH_VARARGS | METH_CLASS, NULL},
    {"open_held", (PyCFunction)(void (*)(void))descriptor_open_held, METH_FASTCALL | METH_CLASS,
     NULL},
    {"fileno", (PyCFunction)descriptor_fileno, METH_NOARGS, NULL},
    {"close", (PyCFunction)(void (*)(void))descriptor_close, METH_FASTCALL, NULL},
    {"take", (PyCFunction)descriptor_take, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef descriptor_attributes[] = {
    {"closed", descriptor_get_closed, NULL, "Whether it is closed.", NULL},
    {"inherited", descriptor_get_inherited, NULL, "Whether it was the parent's, and is closed.",
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot descriptor_slots[] = {
    {Py_tp_doc, "Made by Descriptor.open and Descriptor.open_held: see _native.pyi."},
    {Py_tp_dealloc, descriptor_dealloc},
    {Py_tp_traverse, descriptor_traverse},
    {Py_tp_clear, descriptor_clear},
    {Py_tp_methods, descriptor_methods},
    {Py_tp_getset, descriptor_attributes},
    {0, NULL},
};

static PyType_Spec descriptor_spec = {
    .name = "shmepoch.memory._native.Descriptor",
    .basicsize = sizeof(Descriptor),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE
             | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = descriptor_slots,
};

static PyMethodDef module_methods[] = {
    {"try_lock", (PyCFunction)(void (*)(void))native_try_lock, METH_FASTCALL, NULL},
    {"unlock", (PyCFunction)(void (*)(void))native_unlock, METH_FASTCALL, NULL},
    {"is_locked", (PyCFunction)(void (*)(void))native_is_locked, METH_FASTCALL, NULL},
    {"leave_inherited", (PyCFunction)native_leave_inherited, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

/* --- WriterLock ------------------------------------------------------------------------------
 *
 * A context manager in C: between taking the lock and entering the block there is no instruction at
 * which a signal handler could raise and leave the lock taken.
 *
 * A wait for it ends within a bounded time of a signal or of the lock's retirement, whatever holds
 * it. So no wait is a blocking system call without a limit: fcntl(2) has no timed wait for a lock,
 * and nothing but a signal interrupts F_OFD_SETLKW. The lock of another process is polled instead,
 * with pauses that grow with the time waited: a part of it, from what a transition takes to what costs
 * next to no processor.
 */

static const int64_t LOCK_PAUSE_PART = 16;
static const int64_t LOCK_PAUSE_MIN_NS = 10 * 1000;
static const int64_t LOCK_PAUSE_MAX_NS = 1000 * 1000;

/* How long a file may have lost its name before a transition hears of it: a look takes as long as
 * the lock itself, and the time of the coarse clock a twentieth of that. */
static const int64_t LOOK_NS = 500 * 1000 * 1000;

typedef _Atomic(PyObject *) shared_object_t;

typedef struct {
    PyObject_HEAD
    PyThread_type_lock threads; /* between the threads of this process */
    Descriptor *descriptor;     /* between processes, */
    int fd;                     /* or this number; -1 where there is neither, for private memory */
    off_t at;
    /* Called where an entry finds the descriptor to be a forked child's parent's, to open it again, or
     * the file without a name; or NULL. */
    PyObject *attend;
    int64_t looked_ns; /* when the file had a name; guarded by the lock */
    _Atomic unsigned long owner; /* the thread inside, to refuse it a second time */
    /* Makes the error of a retired lock, NULL before. Set once, so that it is read without a lock. */
    shared_object_t on_closed;
    /* Called by the last thread out, where `retire` did not wait for it. */
    shared_object_t on_left;
} WriterLock;

static PyObject *
writer_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"fd", "byte", "attend", NULL};
    PyObject *carrier, *attend = Py_None;
    int fd = -1;
    long long at;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OL|O:WriterLock", keywords, &carrier, &at,
                                     &attend)) {
        return NULL;
    }
    ModuleState *state = PyType_GetModuleState(type);
    const bool is_descriptor = Py_IS_TYPE(carrier, state->descriptor_type);
    if (!is_descriptor) {
        long number = PyLong_AsLong(carrier);
        if (number == -1 && PyErr_Occurred()) {
            return NULL;
        }
        fd = number < -1 || number > INT_MAX ? -2 : (int)number;
    }
    if (fd < -1 || at < 0) {
        return PyErr_Format(PyExc_ValueError, "no byte %lld of %R", at, carrier);
    }
    if (attend != Py_None && (!is_descriptor || !PyCallable_Check(attend))) {
        PyErr_SetString(PyExc_TypeError, "attend is called about a Descriptor");
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    WriterLock *self = (WriterLock *)allocate(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->descriptor = is_descriptor ? (Descriptor *)Py_NewRef(carrier) : NULL;
    self->fd = fd;
    self->at = (off_t)at;
    self->attend = attend == Py_None ? NULL : Py_NewRef(attend);
    self->looked_ns = coarse_ns();
    atomic_init(&self->owner, 0);
    atomic_init(&self->on_closed, NULL);
    atomic_init(&self->on_left, NULL);
    self->threads = PyThread_allocate_lock();
    if (self->threads == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static int
writer_traverse(PyObject *object, visitproc visit, void *arg)
{
    WriterLock *self = (WriterLock *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT((PyObject *)self->descriptor);
    Py_VISIT(self->attend);
    Py_VISIT(atomic_load_explicit(&self->on_closed, memory_order_relaxed));
    Py_VISIT(atomic_load_explicit(&self->on_left, memory_order_relaxed));
    return 0;
}

static int
writer_clear(PyObject *object)
{
    WriterLock *self = (WriterLock *)object;
    Py_CLEAR(self->attend);
    Py_XDECREF(atomic_exchange_explicit(&self->on_closed, NULL, memory_order_acq_rel));
    Py_XDECREF(atomic_exchange_explicit(&self->on_left, NULL, memory_order_acq_rel));
    return 0;
}

static void
writer_dealloc(PyObject *object)
{
    WriterLock *self = (WriterLock *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    writer_clear(object);
    Py_XDECREF((PyObject *)self->descriptor);
    if (self->threads != NULL) {
        PyThread_free_lock(self->threads);
    }
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static int
writer_fd(const WriterLock *self)
{
    return self->descriptor != NULL ? self->descriptor->fd : self->fd;
}

static bool
writer_is_shared(const WriterLock *self)
{
    return self->descriptor != NULL || self->fd >= 0;
}

/* Acquire; pairs with the release in `writer_retire`: the error's maker is whole. */
static bool
writer_is_retired(WriterLock *self)
{
    return atomic_load_explicit(&self->on_closed, memory_order_acquire) != NULL;
}

/* Only the thread itself stores its own number, so a relaxed load is enough to know it. */
static bool
writer_is_mine(WriterLock *self)
{
    return atomic_load_explicit(&self->owner, memory_order_relaxed) == PyThread_get_thread_ident();
}

/* Waits until `deadline` at most: 1, or 0 if that passed, or -1 with what a signal handler raised. */
static int
writer_take_thread_lock(WriterLock *self, int64_t deadline)
{
    PyLockStatus status = PyThread_acquire_lock_timed(self->threads, 0, 0);
    while (status != PY_LOCK_ACQUIRED) {
        const int64_t limit = sleep_limit(deadline);
        if (limit <= 0) {
            return 0;
        }
        Py_BEGIN_ALLOW_THREADS
        status = PyThread_acquire_lock_timed(self->threads, limit / 1000 + 1, 1);
        Py_END_ALLOW_THREADS
        if (status != PY_LOCK_ACQUIRED && PyErr_CheckSignals() < 0) {
            return -1;
        }
    }
    atomic_store_explicit(&self->owner, PyThread_get_thread_ident(), memory_order_relaxed);
    return 1;
}

/* The fences here and in `writer_leave_to_last` are of one pair: this side releases the lock, then
 * looks for what was left to it; the other side leaves it, then looks at the lock. At least one sees
 * the other. */
static void
writer_drop_thread_lock(WriterLock *self)
{
    atomic_store_explicit(&self->owner, 0, memory_order_relaxed);
    PyThread_release_lock(self->threads);
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&self->on_left, memory_order_relaxed) == NULL) {
        return;
    }
    PyObject *on_left = atomic_exchange_explicit(&self->on_left, NULL, memory_order_acq_rel);
    if (on_left == NULL) {
        return;
    }
    PyObject *type, *value, *traceback; /* of an entry that was refused */
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *result = PyObject_CallFunctionObjArgs(on_left, NULL);
    if (result == NULL) {
        PyErr_WriteUnraisable(on_left); /* the transition that ends here stands all the same */
    }
    Py_XDECREF(result);
    Py_DECREF(on_left);
    PyErr_Restore(type, value, traceback);
}

/* Without the interpreter lock: 0 once the lock is taken, or an errno. EAGAIN where it is another's
 * still, for the caller to look after signals and ask again. */
static int
writer_poll_process_lock(WriterLock *self, int64_t began_ns)
{
    struct flock lock = byte_lock(F_WRLCK, self->at);
    int64_t now_ns = monotonic_ns();
    const int64_t end_ns = now_ns + sleep_limit(INT64_MAX);
    while (!writer_is_retired(self)) {
        if (fcntl(writer_fd(self), F_OFD_SETLK, &lock) == 0) {
            return 0;
        }
        if ((errno != EAGAIN && errno != EACCES) || now_ns >= end_ns) {
            return errno;
        }
        int64_t pause_ns = (now_ns - began_ns) / LOCK_PAUSE_PART;
        pause_ns = pause_ns > LOCK_PAUSE_MIN_NS ? pause_ns : LOCK_PAUSE_MIN_NS;
        pause_ns = pause_ns < LOCK_PAUSE_MAX_NS ? pause_ns : LOCK_PAUSE_MAX_NS;
        const struct timespec pause = {.tv_sec = 0, .tv_nsec = (long)pause_ns};
        if (nanosleep(&pause, NULL) != 0) {
            return errno;
        }
        now_ns = monotonic_ns();
    }
    return EAGAIN;
}

/* Whether the lock between processes is taken; false without an error set where it was retired.
 *
 * First without releasing the interpreter lock, since the lock is nearly always free; only a wait
 * is worth the price of letting other threads run. */
static bool
writer_take_process_lock(WriterLock *self)
{
    struct flock lock = byte_lock(F_WRLCK, self->at);
    if (writer_is_retired(self)) {
        return false;
    }
    if (!writer_is_shared(self) || fcntl(writer_fd(self), F_OFD_SETLK, &lock) == 0) {
        return true;
    }
    int error = errno;
    const int64_t began_ns = monotonic_ns();
    while (error == EAGAIN || error == EACCES || error == EINTR) {
        if (PyErr_CheckSignals() < 0 || writer_is_retired(self)) {
            return false;
        }
        Py_BEGIN_ALLOW_THREADS
        error = writer_poll_process_lock(self, began_ns);
        Py_END_ALLOW_THREADS
        if (error == 0) {
            return true;
        }
    }
    errno = error;
    PyErr_SetFromErrno(PyExc_OSError);
    return false;
}

/* For a lock that was not taken: raises what a signal handler or the system said, or else that it is
 * retired. */
static PyObject *
writer_refuse(WriterLock *self)
{
    if (!PyErr_Occurred()) {
        PyObject *on_closed =
            Py_XNewRef(atomic_load_explicit(&self->on_closed, memory_order_acquire));
        raise_closed(on_closed);
        Py_XDECREF(on_closed);
    }
    return NULL;
}

/* Whether the descriptor is open, or was opened again, for a lock that is not taken yet. */
static bool
writer_opens(WriterLock *self)
{
    if (self->descriptor == NULL || self->descriptor->fd >= 0 || writer_is_retired(self)) {
        return true;
    }
    PyObject *attended =
        self->attend == NULL ? Py_NewRef(Py_None) : PyObject_CallFunctionObjArgs(self->attend, NULL);
    if (attended != NULL && self->descriptor->fd < 0 && !writer_is_retired(self)) {
        raise_closed(self->descriptor->on_closed);
        Py_CLEAR(attended);
    }
    Py_XDECREF(attended);
    return attended != NULL;
}

/* Whether the file has its name still, as looked up now and then, or nothing is to be said of it. */
static bool
writer_has_name(WriterLock *self)
{
    if (self->attend == NULL) {
        return true;
    }
    const int64_t now_ns = coarse_ns();
    if (now_ns - self->looked_ns < LOOK_NS) {
        return true;
    }
    struct stat found;
    if (fstat(writer_fd(self), &found) == 0 && found.st_nlink == 0) {
        PyObject *attended = PyObject_CallFunctionObjArgs(self->attend, NULL);
        if (attended == NULL) {
            return false; /* and every entry from now on looks again */
        }
        Py_DECREF(attended);
    }
    self->looked_ns = now_ns;
    return true;
}

/* Give up the locks; 0 or the errno of the one between processes. */
static int
writer_leave(WriterLock *self)
{
    struct flock lock = byte_lock(F_UNLCK, self->at);
    const bool released =
        !writer_is_shared(self) || fcntl(writer_fd(self), F_OFD_SETLK, &lock) == 0;
    const int error = released ? 0 : errno;
    writer_drop_thread_lock(self);
    return error;
}

static PyObject *
writer_enter(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    WriterLock *self = (WriterLock *)object;
    if (writer_is_mine(self)) {
        PyErr_SetString(PyExc_RuntimeError,
                        "this thread is in a transition of the same epoch already (a signal "
                        "handler or finalizer may not start another)");
        return NULL;
    }
    if (!writer_opens(self) || writer_take_thread_lock(self, INT64_MAX) < 0) {
        return NULL;
    }
    if (!writer_take_process_lock(self)) {
        writer_drop_thread_lock(self);
        return writer_refuse(self);
    }
    if (!writer_has_name(self)) {
        writer_leave(self);
        return NULL;
    }
    Py_RETURN_NONE;
}

/* Enters if nothing has to be waited for, this thread's own transition included: 1, or 0 if something
 * has, or -1 with an error. */
static int
writer_try_enter(WriterLock *self)
{
    if (writer_is_retired(self)) {
        writer_refuse(self);
        return -1;
    }
    if (!writer_opens(self)) {
        return -1;
    }
    if (writer_is_mine(self)
        || PyThread_acquire_lock_timed(self->threads, 0, 0) != PY_LOCK_ACQUIRED) {
        return 0;
    }
    atomic_store_explicit(&self->owner, PyThread_get_thread_ident(), memory_order_relaxed);
    /* Once more: until here, `retire` finds no thread inside, and its caller closes the descriptor. */
    if (writer_is_retired(self)) {
        writer_drop_thread_lock(self);
        writer_refuse(self);
        return -1;
    }
    struct flock lock = byte_lock(F_WRLCK, self->at);
    if (!writer_is_shared(self) || fcntl(writer_fd(self), F_OFD_SETLK, &lock) == 0) {
        if (writer_has_name(self)) {
            return 1;
        }
        writer_leave(self);
        return -1;
    }
    const int error = errno;
    writer_drop_thread_lock(self);
    if (error == EAGAIN || error == EACCES) {
        return 0;
    }
    errno = error;
    PyErr_SetFromErrno(PyExc_OSError);
    return -1;
}

static PyObject *
writer_exit(PyObject *object, PyObject *const *Py_UNUSED(args), Py_ssize_t Py_UNUSED(nargs))
{
    WriterLock *self = (WriterLock *)object;
    if (!writer_is_mine(self)) {
        PyErr_SetString(PyExc_RuntimeError, "the writer lock is released by the thread that holds it");
        return NULL;
    }
    const int error = writer_leave(self);
    if (error != 0) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

/* after_fork() -> whether the thread that forked was inside
 *
 * In a forked child, where no other thread of the parent is: free. But of private memory the child
 * has a copy, and the thread that forked is inside still. */
static PyObject *
writer_after_fork(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    WriterLock *self = (WriterLock *)object;
    const bool inside = writer_is_mine(self);
    if (inside && !writer_is_shared(self)) {
        Py_RETURN_TRUE;
    }
    PyThread_type_lock threads = PyThread_allocate_lock();
    if (threads == NULL) {
        return PyErr_NoMemory();
    }
    self->threads = threads; /* the old one may be held, and is not to be freed then */
    atomic_store_explicit(&self->owner, 0, memory_order_relaxed);
    return bool_object(inside);
}

/* Has `on_left` called by the last thread out, which is this one if the others have left meanwhile. */
static void
writer_leave_to_last(WriterLock *self, PyObject *on_left)
{
    PyObject *before =
        atomic_exchange_explicit(&self->on_left, Py_NewRef(on_left), memory_order_acq_rel);
    Py_XDECREF(before);
    atomic_thread_fence(memory_order_seq_cst);
    if (PyThread_acquire_lock_timed(self->threads, 0, 0) == PY_LOCK_ACQUIRED) {
        writer_drop_thread_lock(self);
    }
}

/* retire(on_closed[, timeout_ns[, on_left]]) -> whether no thread of the process is inside
 *
 * Every entry from now on is refused, those that wait included. For a caller that is about to close
 * the descriptor, which gives the lock up in the middle of a transition as well: after True it may.
 * After False, and where a signal handler raises, `on_left` is called by the last thread out. */
static PyObject *
writer_retire(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    WriterLock *self = (WriterLock *)object;
    int64_t deadline = INT64_MAX;
    if (nargs < 1 || nargs > 3) {
        return PyErr_Format(PyExc_TypeError, "retire takes 1 to 3 arguments, not %zd", nargs);
    }
    PyObject *on_left = nargs > 2 ? args[2] : Py_None;
    if (!PyCallable_Check(args[0]) || (on_left != Py_None && !PyCallable_Check(on_left))) {
        PyErr_SetString(PyExc_TypeError,
                        "on_closed is called to make the error, and on_left by the last one out");
        return NULL;
    }
    if (nargs > 1 && !parse_timeout(args[1], &deadline)) {
        return NULL;
    }
    PyObject *none = NULL;
    Py_INCREF(args[0]);
    if (!atomic_compare_exchange_strong_explicit(&self->on_closed, &none, args[0],
                                                 memory_order_acq_rel, memory_order_relaxed)) {
        Py_DECREF(args[0]); /* it was retired before */
    }
    /* Under this thread's own transition, as in a signal handler, nothing is to be waited for. */
    const int taken = writer_is_mine(self) ? 0 : writer_take_thread_lock(self, deadline);
    if (taken > 0) {
        writer_drop_thread_lock(self);
        Py_RETURN_TRUE;
    }
    if (on_left != Py_None) {
        writer_leave_to_last(self, on_left);
    }
    return taken < 0 ? NULL : bool_object(false);
}

static PyObject *writer_if_free(PyObject *object, PyObject *on_busy);
static PyMethodDef writer_methods[] = {
    {"__enter__", (PyCFunction)writer_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))writer_exit, METH_FASTCALL, NULL},
    {"after_fork", (PyCFunction)writer_after_fork, METH_NOARGS,
     "In a forked child: free, unless this thread holds private memory's; whether it held it."},
    {"if_free", (PyCFunction)writer_if_free, METH_O,
     "if_free(on_busy, /): the lock as a context that is entered only if that waits for nothing."},
    {"retire", (PyCFunction)(void (*)(void))writer_retire, METH_FASTCALL,
     "retire(on_closed, timeout_ns=None, on_left=None, /): refuse every entry from now on, and wait "
     "until no thread is inside; whether that is so."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot writer_slots[] = {
    {Py_tp_doc, "WriterLock(fd, byte): excludes threads and processes; fd -1 excludes threads."},
    {Py_tp_new, writer_new},
    {Py_tp_dealloc, writer_dealloc},
    {Py_tp_traverse, writer_traverse},
    {Py_tp_clear, writer_clear},
    {Py_tp_methods, writer_methods},
    {0, NULL},
};

static PyType_Spec writer_spec = {
    .name = "shmepoch.memory._native.WriterLock",
    .basicsize = sizeof(WriterLock),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = writer_slots,
};

/* --- IfFree ----------------------------------------------------------------------------------
 *
 * A context of its own, and not a call that says whether the lock was taken: a signal handler that
 * raised after such a call, and before the block, would leave the lock taken. */

typedef struct {
    PyObject_HEAD
    WriterLock *writer;
    PyObject *on_busy; /* makes the error of a lock that is held */
} IfFree;

static PyObject *
writer_if_free(PyObject *object, PyObject *on_busy)
{
    if (!PyCallable_Check(on_busy)) {
        PyErr_SetString(PyExc_TypeError, "on_busy is called to make the error");
        return NULL;
    }
    ModuleState *state = PyType_GetModuleState(Py_TYPE(object));
    allocfunc allocate = (allocfunc)PyType_GetSlot(state->if_free_type, Py_tp_alloc);
    IfFree *self = (IfFree *)allocate(state->if_free_type, 0);
    if (self != NULL) {
        self->writer = (WriterLock *)Py_NewRef(object);
        self->on_busy = Py_NewRef(on_busy);
    }
    return (PyObject *)self;
}

static PyObject *
if_free_enter(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    IfFree *self = (IfFree *)object;
    const int entered = writer_try_enter(self->writer);
    if (entered > 0) {
        Py_RETURN_NONE;
    }
    if (entered == 0) {
        raise_closed(self->on_busy);
    }
    return NULL;
}

static PyObject *
if_free_exit(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    return writer_exit((PyObject *)((IfFree *)object)->writer, args, nargs);
}

static int
if_free_traverse(PyObject *object, visitproc visit, void *arg)
{
    IfFree *self = (IfFree *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT((PyObject *)self->writer);
    Py_VISIT(self->on_busy);
    return 0;
}

static void
if_free_dealloc(PyObject *object)
{
    IfFree *self = (IfFree *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    Py_XDECREF((PyObject *)self->writer);
    Py_XDECREF(self->on_busy);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyMethodDef if_free_methods[] = {
    {"__enter__", (PyCFunction)if_free_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))if_free_exit, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot if_free_slots[] = {
    {Py_tp_dealloc, if_free_dealloc},
    {Py_tp_traverse, if_free_traverse},
    {Py_tp_methods, if_free_methods},
    {0, NULL},
};

static PyType_Spec if_free_spec = {
    .name = "shmepoch.memory._native.IfFree",
    .basicsize = sizeof(IfFree),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE
             | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = if_free_slots,
};

/* --- module ---------------------------------------------------------------------------------- */

static PyTypeObject *
add_type(PyObject *module, PyType_Spec *spec)
{
    PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    if (type != NULL && PyModule_AddType(module, type) < 0) {
        Py_CLEAR(type);
    }
    return type;
}

static int
module_exec(PyObject *module)
{
    ModuleState *state = PyModule_GetState(module);
    state->memory_type = add_type(module, &memory_spec);
    state->descriptor_type = add_type(module, &descriptor_spec);
    if (state->memory_type == NULL || state->descriptor_type == NULL) {
        return -1;
    }
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    /* Made by methods of the others only, so the module does not name them. */
    state->transitions_type =
        (PyTypeObject *)PyType_FromModuleAndSpec(module, &transitions_spec, NULL);
    state->snapshots_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &snapshots_spec, NULL);
    state->if_free_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &if_free_spec, NULL);
    if (state->transitions_type == NULL || state->snapshots_type == NULL
        || state->if_free_type == NULL) {
        return -1;
    }
    PyType_Spec *others[] = {&cell_spec, &writer_spec};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        PyTypeObject *type = add_type(module, others[i]);
        if (type == NULL) {
            return -1;
        }
        Py_DECREF(type);
    }
    return 0;
}

static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    ModuleState *state = PyModule_GetState(module);
    Py_VISIT(state->memory_type);
    Py_VISIT(state->descriptor_type);
    Py_VISIT(state->transitions_type);
    Py_VISIT(state->snapshots_type);
    Py_VISIT(state->if_free_type);
    return 0;
}

static int
module_clear(PyObject *module)
{
    ModuleState *state = PyModule_GetState(module);
    Py_CLEAR(state->memory_type);
    Py_CLEAR(state->descriptor_type);
    Py_CLEAR(state->transitions_type);
    Py_CLEAR(state->snapshots_type);
    Py_CLEAR(state->if_free_type);
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shmepoch.memory._native",
    .m_doc = "Atomics, ring copies, futexes and record locks on mapped memory.",
    .m_size = sizeof(ModuleState),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC
PyInit__native(void)
{
    return PyModuleDef_Init(&module_definition);
}
