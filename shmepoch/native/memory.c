/* Memory: a mapping, shared (of a descriptor) or private, with atomic access to its words.
 *
 * A caller passes byte offsets. Every method checks that they are aligned and inside the mapping
 * before it accesses a byte.
 *
 * It does not use the mmap of the standard library: that is a buffer that all code may write to
 * with plain stores. Python code writes to a Memory through its atomic methods only.
 */

#include "common.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

/* `count` spans of `length` bytes, `stride` apart, from `offset` on: inside, and word-aligned. */
bool
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

/* --- life -------------------------------------------------------------------------------------- */

PyObject *
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
    spin_as_long_as_it_may_pay(self);
    return (PyObject *)self;
}

/* Another description of the file of `fd`, or -1 and errno. */
static int
open_again(int fd)
{
    char link[sizeof "/proc/self/fd/" + 3 * sizeof fd];
    PyOS_snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return open(link, O_RDWR | O_CLOEXEC);
}

/* Maps through a description of its own. A mapping holds the description it was made through, and
 * with it every lock, also in a forked child and after the descriptor was closed. */
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
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    PyObject *self = memory_map(type, again, size, MAP_SHARED);
    close(again);
    return self;
}

int
map_again(const Memory *self, int fd)
{
    int again = open_again(fd);
    if (again < 0) {
        return errno;
    }
    void *base = mmap(self->base, (size_t)self->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                      again, 0);
    const int error = base == MAP_FAILED ? errno : 0;
    close(again);
    return error;
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

/* --- single words ------------------------------------------------------------------------------ */

/* Acquire; pairs with the release in `store` and in the read-modify-writes: a reader of the word
 * sees everything that was written before the word was published. */
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

/* Sequentially consistent: a doorbell mask is set before, or taken after, a check of another word. */
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

/* --- many words -------------------------------------------------------------------------------- */

bool
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

/* find(offset, count, value, start[, stride]) -> index or -1; without a stride, the words are
 * adjacent */
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
    return PyLong_FromSsize_t(find_word(word_at(self, offset), count, stride, value, start));
}

/* --- bytes ------------------------------------------------------------------------------------- */

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
        || !check_spans(self, offset, 1, 0, (Py_ssize_t)padded((uint64_t)length))) {
        return NULL;
    }
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, length);
    if (bytes != NULL) {
        copy_out(word_at(self, offset), (unsigned char *)PyBytes_AsString(bytes), (uint64_t)length);
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
        || !check_spans(self, offset, 1, 0, (Py_ssize_t)padded((uint64_t)length))) {
        return NULL;
    }
    atomic_thread_fence(memory_order_release);
    copy_in(word_at(self, offset), (const unsigned char *)source, (uint64_t)length);
    Py_RETURN_NONE;
}

static PyMethodDef memory_methods[] = {
    {"private", (PyCFunction)memory_private, METH_O | METH_CLASS, NULL},
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
    {"wait_above", (PyCFunction)(void (*)(void))memory_wait_above, METH_FASTCALL, NULL},
    {"wake", (PyCFunction)memory_wake, METH_O, NULL},
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

PyType_Spec memory_spec = {
    .name = "shmepoch._native.Memory",
    .basicsize = sizeof(Memory),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = memory_slots,
};
