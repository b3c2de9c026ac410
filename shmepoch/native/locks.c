/* Locks of single bytes of a file, and WriterLock: a thread lock and a byte lock, taken together.
 *
 * Open-file-description locks belong to the open file description, not to the process (fcntl(2)): two
 * attachments of one process exclude each other, and the kernel drops them with the last descriptor,
 * however its holder died.
 *
 * LOCK-2: the code under the writer lock is C, and neither needs nor takes the interpreter lock. So
 * a process that waits for its interpreter does not delay other processes, and no signal handler,
 * finalizer or callback runs inside.
 */

#include "common.h"

#include <errno.h>
#include <sys/stat.h>

struct flock
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

PyMethodDef lock_functions[] = {
    {"try_lock", (PyCFunction)(void (*)(void))native_try_lock, METH_FASTCALL, NULL},
    {"unlock", (PyCFunction)(void (*)(void))native_unlock, METH_FASTCALL, NULL},
    {"is_locked", (PyCFunction)(void (*)(void))native_is_locked, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

/* --- WriterLock -------------------------------------------------------------------------------
 *
 * A wait for it ends within a bounded time of a signal or of the lock's retirement, whatever process holds
 * it. So no wait is a blocking system call without a limit: fcntl(2) has no timed wait for a lock,
 * and only a signal interrupts F_OFD_SETLKW. The lock is polled instead. The pauses are a part of
 * the time waited: at least about as long as a transition, at most so long that polling costs
 * almost no processor time.
 */

static const int64_t LOCK_PAUSE_PART = 16;
static const int64_t LOCK_PAUSE_MIN_NS = 10 * 1000;
static const int64_t LOCK_PAUSE_MAX_NS = 1000 * 1000;

/* How long a transition may not notice that the file has lost its name. It is not checked each
 * time: a check takes as long as the lock itself, and reading the coarse clock a twentieth of
 * that. */
static const int64_t NAME_CHECK_NS = 500 * 1000 * 1000;

struct WriterLock {
    PyObject_HEAD
    PyThread_type_lock threads; /* between the threads of this process */
    Descriptor *descriptor;     /* between processes; NULL of private memory */
    off_t at;
    /* Called without a lock, or NULL. In a forked child with its parent's descriptor it opens the
     * file again; it is also called where the file has no name. */
    PyObject *attend;
    _Atomic int64_t named_ns; /* when the file last had a name */
    word_t participant;
    /* Makes the error of a retired lock; NULL before. Set once, so it can be read without a
     * lock. */
    shared_object_t on_closed;
};

/* The result of an attempt to take the lock. */
typedef enum {
    LOCK_TAKEN,
    LOCK_BUSY,    /* another thread or process has it */
    LOCK_RETIRED, /* its attachment has left */
    LOCK_CLOSED,  /* its descriptor is closed, perhaps as the parent's */
    LOCK_NAMELESS,
    LOCK_FAILED, /* errno says why */
} LockState;

/* The time to a few milliseconds, at a fraction of the cost. */
static int64_t
coarse_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static PyObject *
writer_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"descriptor", "byte", "attend", NULL};
    PyObject *descriptor = Py_None, *attend = Py_None;
    long long at = WRITER_BYTE;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|OLO:WriterLock", keywords, &descriptor, &at,
                                     &attend)) {
        return NULL;
    }
    ModuleState *state = PyType_GetModuleState(type);
    if (descriptor != Py_None && !Py_IS_TYPE(descriptor, state->descriptor_type)) {
        PyErr_SetString(PyExc_TypeError, "a writer lock is of a Descriptor, or of None");
        return NULL;
    }
    if (at < 0) {
        return PyErr_Format(PyExc_ValueError, "no byte %lld of a file", at);
    }
    if (attend != Py_None && (descriptor == Py_None || !PyCallable_Check(attend))) {
        PyErr_SetString(PyExc_TypeError, "attend is called about a Descriptor");
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    WriterLock *self = (WriterLock *)allocate(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->descriptor = descriptor == Py_None ? NULL : (Descriptor *)Py_NewRef(descriptor);
    self->at = (off_t)at;
    self->attend = attend == Py_None ? NULL : Py_NewRef(attend);
    atomic_init(&self->named_ns, coarse_ns());
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
    return 0;
}

static int
writer_clear(PyObject *object)
{
    WriterLock *self = (WriterLock *)object;
    Py_CLEAR(self->attend);
    Py_XDECREF(atomic_exchange_explicit(&self->on_closed, NULL, memory_order_acq_rel));
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

uint64_t
writer_participant(const WriterLock *self)
{
    return atomic_load_explicit(&self->participant, memory_order_acquire);
}

/* Acquire; pairs with the release in `writer_retire`: `on_closed` is seen whole. */
static bool
writer_is_retired(WriterLock *self)
{
    return atomic_load_explicit(&self->on_closed, memory_order_acquire) != NULL;
}

/* GONE-1: whether the file has lost its name, checked from time to time. */
static bool
writer_is_nameless(WriterLock *self, int fd)
{
    const int64_t now_ns = coarse_ns();
    if (self->attend == NULL
        || now_ns - atomic_load_explicit(&self->named_ns, memory_order_relaxed) < NAME_CHECK_NS) {
        return false;
    }
    struct stat found;
    if (fstat(fd, &found) == 0 && found.st_nlink == 0) {
        return true;
    }
    atomic_store_explicit(&self->named_ns, now_ns, memory_order_relaxed);
    return false;
}

/* Both locks, or neither. */
static LockState
writer_try(WriterLock *self)
{
    if (PyThread_acquire_lock_timed(self->threads, 0, 0) != PY_LOCK_ACQUIRED) {
        return writer_is_retired(self) ? LOCK_RETIRED : LOCK_BUSY;
    }
    LockState state = LOCK_TAKEN;
    /* With the thread lock: `retire` waits for that one before its caller closes the descriptor. */
    if (writer_is_retired(self)) {
        state = LOCK_RETIRED;
    }
    else if (self->descriptor != NULL) {
        const int fd = atomic_load_explicit(&self->descriptor->fd, memory_order_acquire);
        struct flock lock = byte_lock(F_WRLCK, self->at);
        if (fd < 0) {
            state = LOCK_CLOSED;
        }
        else if (fcntl(fd, F_OFD_SETLK, &lock) != 0) {
            state = errno == EAGAIN || errno == EACCES ? LOCK_BUSY : LOCK_FAILED;
        }
        else if (writer_is_nameless(self, fd)) {
            state = LOCK_NAMELESS;
            lock.l_type = F_UNLCK;
            fcntl(fd, F_OFD_SETLK, &lock);
        }
    }
    if (state != LOCK_TAKEN) {
        PyThread_release_lock(self->threads);
    }
    return state;
}

static void
writer_release(WriterLock *self)
{
    if (self->descriptor != NULL) {
        struct flock lock = byte_lock(F_UNLCK, self->at);
        /* It fails only if the descriptor is closed, and then the lock is released already. */
        fcntl(self->descriptor->fd, F_OFD_SETLK, &lock);
    }
    PyThread_release_lock(self->threads);
}

/* Tries until the lock is not busy, or for as long as a wait may go on without a check for
 * signals. */
static LockState
writer_poll(WriterLock *self, int64_t began_ns)
{
    int64_t now_ns = monotonic_ns();
    const int64_t end_ns = now_ns + sleep_limit(INT64_MAX);
    LockState state = writer_try(self);
    while (state == LOCK_BUSY && now_ns < end_ns) {
        int64_t pause_ns = (now_ns - began_ns) / LOCK_PAUSE_PART;
        pause_ns = pause_ns > LOCK_PAUSE_MIN_NS ? pause_ns : LOCK_PAUSE_MIN_NS;
        pause_ns = pause_ns < LOCK_PAUSE_MAX_NS ? pause_ns : LOCK_PAUSE_MAX_NS;
        const struct timespec pause = {.tv_sec = 0, .tv_nsec = (long)pause_ns};
        if (nanosleep(&pause, NULL) != 0) {
            break; /* a signal */
        }
        now_ns = monotonic_ns();
        state = writer_try(self);
    }
    return state;
}

/* Reacts to an attempt that did not take the lock; false with an error set. */
static bool
writer_attend(WriterLock *self, LockState state, int error)
{
    if (state == LOCK_RETIRED) {
        raise_closed(atomic_load_explicit(&self->on_closed, memory_order_acquire));
        return false;
    }
    if (state == LOCK_FAILED) {
        errno = error;
        PyErr_SetFromErrno(PyExc_OSError);
        return false;
    }
    if (self->attend != NULL) {
        PyObject *attended = PyObject_CallFunctionObjArgs(self->attend, NULL);
        if (attended == NULL) {
            return false; /* every later attempt checks again */
        }
        Py_DECREF(attended);
    }
    if (state == LOCK_NAMELESS) { /* not published yet: it has had no name */
        atomic_store_explicit(&self->named_ns, coarse_ns(), memory_order_relaxed);
    }
    else if (self->descriptor->fd < 0 && !writer_is_retired(self)) {
        PyObject *fileno = PyObject_CallMethod((PyObject *)self->descriptor, "fileno", NULL);
        Py_XDECREF(fileno); /* another thread has just opened it */
        return fileno != NULL;
    }
    return true;
}

RunState
writer_run(WriterLock *self, bool wait, void (*body)(void *), void *argument)
{
    int64_t began_ns = 0;
    for (;;) {
        /* Keeps the interpreter lock, since this lock is nearly always free. Only a wait is worth
         * the cost of releasing it. */
        LockState state = writer_try(self);
        int error = errno;
        if (state == LOCK_TAKEN) {
            body(argument);
            writer_release(self);
            return RUN_DONE;
        }
        if (state == LOCK_BUSY && wait) {
            if (PyErr_CheckSignals() < 0) {
                return RUN_FAILED;
            }
            began_ns = began_ns == 0 ? monotonic_ns() : began_ns;
            Py_BEGIN_ALLOW_THREADS
            state = writer_poll(self, began_ns);
            error = errno;
            if (state == LOCK_TAKEN) {
                body(argument);
                writer_release(self);
            }
            Py_END_ALLOW_THREADS
        }
        if (state == LOCK_TAKEN) {
            return RUN_DONE;
        }
        if (state == LOCK_BUSY && !wait) {
            return RUN_BUSY;
        }
        if (state != LOCK_BUSY && !writer_attend(self, state, error)) {
            return RUN_FAILED;
        }
    }
}

/* after_fork(): in a forked child the lock is free, since the thread that held it is not there. */
static PyObject *
writer_after_fork(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    WriterLock *self = (WriterLock *)object;
    PyThread_type_lock threads = PyThread_allocate_lock();
    if (threads == NULL) {
        return PyErr_NoMemory();
    }
    self->threads = threads; /* the old one may be held, and then must not be freed */
    Py_RETURN_NONE;
}

/* retire(on_closed): refuses every later attempt, also of those that wait now, and waits until no
 * thread is inside. For a caller that is about to close the descriptor: closing releases the lock,
 * even in the middle of a transition. */
static PyObject *
writer_retire(PyObject *object, PyObject *on_closed)
{
    WriterLock *self = (WriterLock *)object;
    if (!PyCallable_Check(on_closed)) {
        PyErr_SetString(PyExc_TypeError, "on_closed is called to make the error");
        return NULL;
    }
    PyObject *none = NULL;
    Py_INCREF(on_closed);
    if (!atomic_compare_exchange_strong_explicit(&self->on_closed, &none, on_closed,
                                                 memory_order_acq_rel, memory_order_relaxed)) {
        Py_DECREF(on_closed); /* it was retired before */
    }
    if (PyThread_acquire_lock_timed(self->threads, 0, 0) != PY_LOCK_ACQUIRED) {
        Py_BEGIN_ALLOW_THREADS
        PyThread_acquire_lock(self->threads, WAIT_LOCK); /* for as long as a transition takes */
        Py_END_ALLOW_THREADS
    }
    PyThread_release_lock(self->threads);
    Py_RETURN_NONE;
}

static PyObject *
writer_get_participant(PyObject *object, void *Py_UNUSED(closure))
{
    return from_u64(writer_participant((WriterLock *)object));
}

static int
writer_set_participant(PyObject *object, PyObject *value, void *Py_UNUSED(closure))
{
    uint64_t participant;
    if (value == NULL) {
        PyErr_SetString(PyExc_TypeError, "a writer lock has a participant, or 0");
        return -1;
    }
    if (!as_u64(value, &participant)) {
        return -1;
    }
    atomic_store_explicit(&((WriterLock *)object)->participant, participant, memory_order_release);
    return 0;
}

static PyMethodDef writer_methods[] = {
    {"after_fork", (PyCFunction)writer_after_fork, METH_NOARGS,
     "In a forked child: free, since the thread that held it is not there."},
    {"retire", (PyCFunction)writer_retire, METH_O,
     "retire(on_closed, /): refuse every later attempt, and wait until no thread is inside."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef writer_attributes[] = {
    {"participant", writer_get_participant, writer_set_participant,
     "The key of the participant whose lock it is; 0 for none.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot writer_slots[] = {
    {Py_tp_doc, "WriterLock(descriptor=None, byte=0, attend=None): of threads, and of processes "
                "where there is a descriptor."},
    {Py_tp_new, writer_new},
    {Py_tp_dealloc, writer_dealloc},
    {Py_tp_traverse, writer_traverse},
    {Py_tp_clear, writer_clear},
    {Py_tp_methods, writer_methods},
    {Py_tp_getset, writer_attributes},
    {0, NULL},
};

PyType_Spec writer_spec = {
    .name = "shmepoch._native.WriterLock",
    .basicsize = sizeof(WriterLock),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = writer_slots,
};
