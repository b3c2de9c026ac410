/* Descriptor: a file descriptor that is closed with its object, and that a forked child can find.
 *
 * A descriptor carries every lock that was taken through it, and other processes notice a death by
 * those locks. So a descriptor must not leak, whatever a signal handler raises, and a forked child
 * must not keep one of its parent's, whatever another thread of the parent was doing. One rule
 * ensures both: from the system call that opens it, a descriptor has an object that closes it, and
 * the objects of all open descriptors are in one list. Its number is stored nowhere else.
 *
 * LOCK-1: a mapping holds the open file description it was made through, and with it every lock, for
 * as long as the memory is there. So closing a descriptor unlocks its locks explicitly. A forked
 * child must not do that to its parent; it maps the memory again instead.
 */

#include "common.h"

#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

bool
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

/* Held while a descriptor is opened or closed, and over a fork: so a child finds every open one in
 * the list. Opening and closing a file of shared memory never blocks. */
static pthread_mutex_t descriptors_lock = PTHREAD_MUTEX_INITIALIZER;
/* How many forks lie between the first process and this one. A PID does not identify a process: in
 * a container it may be used again. */
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

void
watch_forks(void)
{
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

/* Under `descriptors_lock`. */
static void
descriptor_enlist(Descriptor *self)
{
    ModuleState *state = PyType_GetModuleState(Py_TYPE((PyObject *)self));
    self->link = &state->descriptors;
    self->next = state->descriptors;
    if (self->next != NULL) {
        self->next->link = &self->next;
    }
    state->descriptors = self;
}

/* Under `descriptors_lock`. */
static void
descriptor_delist(Descriptor *self)
{
    if (self->link != NULL) {
        *self->link = self->next;
        if (self->next != NULL) {
            self->next->link = self->link;
        }
    }
    self->link = NULL;
    self->next = NULL;
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

/* Opens `path`; `self` owns the descriptor. Returns errno, or 0. */
static int
descriptor_acquire(Descriptor *self, const char *path, int flags, mode_t mode)
{
    pthread_mutex_lock(&descriptors_lock);
    const int fd = open(path, flags | O_CLOEXEC, mode);
    const int error = fd < 0 ? errno : 0;
    if (fd >= 0) {
        atomic_store_explicit(&self->fd, fd, memory_order_release);
        descriptor_enlist(self);
    }
    pthread_mutex_unlock(&descriptors_lock);
    return error;
}

/* False with an error set if a forked child could not map the memory again, and so keeps the locks
 * of its parent. The descriptor is closed in any case, and once. */
static bool
descriptor_release(Descriptor *self)
{
    int error = 0;
    pthread_mutex_lock(&descriptors_lock);
    const int fd = atomic_exchange_explicit(&self->fd, -1, memory_order_acq_rel);
    Memory *memory = NULL;
    if (fd >= 0) {
        descriptor_delist(self);
        memory = self->memory;
        self->memory = NULL;
        if (!descriptor_is_inherited(self)) {
            struct flock every = byte_lock(F_UNLCK, 0);
            every.l_len = 0; /* to the end, as fcntl(2) has it */
            fcntl(fd, F_OFD_SETLK, &every);
        }
        else {
            atomic_store_explicit(&self->inherited, true, memory_order_relaxed);
            error = memory == NULL ? 0 : map_again(memory, fd);
        }
        close(fd);
    }
    pthread_mutex_unlock(&descriptors_lock);
    Py_XDECREF((PyObject *)memory);
    if (error != 0) {
        errno = error;
        PyErr_SetFromErrno(PyExc_OSError);
    }
    return error == 0;
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

/* open(path, flags, mode=0o600): like os.open, and closed on exec. The interpreter lock is kept:
 * opening a file of shared memory never blocks. */
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
        const int error = descriptor_acquire(self, PyBytes_AsString(name), flags, (mode_t)mode);
        if (error != 0) {
            errno = error;
            PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path);
            Py_CLEAR(self);
        }
    }
    Py_DECREF(name);
    return (PyObject *)self;
}

/* Whether the byte's shared lock is now held, and the file of `fd` is as expected. The file is
 * checked after the lock is taken: while the lock is held, the file stays so. */
static bool
hold(int fd, off_t at, mode_t mode, Py_ssize_t length, struct stat *found)
{
    struct flock lock = byte_lock(F_RDLCK, at);
    return fcntl(fd, F_OFD_SETLK, &lock) == 0 && fstat(fd, found) == 0 && found->st_mode == mode
           && found->st_uid == geteuid() && found->st_nlink > 0 && found->st_size >= length;
}

/* open_held(path, byte, mode, length, mapped) -> (descriptor, size, first bytes, memory), or None
 *
 * Opens, locks, checks, reads and maps a file in one call, if all is in order. If not, nothing
 * stays open, and the caller repeats it step by step. The memory, None unless `mapped`, is mapped
 * through the description of the descriptor: another description would take a seventh of an attach.
 * The bytes come from pread and not from the mapping, whose first access takes longer.
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
    struct stat found;
    if (self != NULL
        && descriptor_acquire(self, PyBytes_AsString(name), O_RDWR | O_NOFOLLOW, 0) == 0) {
        const int fd = self->fd;
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
    PyErr_Clear(); /* a failed mapping: the caller finds out why */
    Py_RETURN_NONE;
}

static PyObject *
descriptor_fileno(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    const Descriptor *self = (const Descriptor *)object;
    const int fd = atomic_load_explicit(&self->fd, memory_order_acquire);
    if (fd >= 0) {
        return PyLong_FromLong(fd);
    }
    PyObject *on_closed;
    BEGIN_EXCLUSIVE(object)
    on_closed = Py_XNewRef(self->on_closed);
    END_EXCLUSIVE()
    raise_closed(on_closed);
    Py_XDECREF(on_closed);
    return NULL;
}

/* close(on_closed=None): does not close twice. */
static PyObject *
descriptor_close(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Descriptor *self = (Descriptor *)object;
    if (nargs > 1) {
        return PyErr_Format(PyExc_TypeError, "close takes at most 1 argument, not %zd", nargs);
    }
    if (nargs == 1 && args[0] != Py_None) {
        if (!PyCallable_Check(args[0])) {
            PyErr_SetString(PyExc_TypeError, "on_closed is called to make the error");
            return NULL;
        }
        PyObject *before;
        BEGIN_EXCLUSIVE(object)
        before = self->on_closed;
        self->on_closed = Py_NewRef(args[0]);
        END_EXCLUSIVE()
        Py_XDECREF(before);
    }
    /* A child that closes an inherited descriptor must not open it again. */
    atomic_store_explicit(&self->inherited, false, memory_order_relaxed);
    if (!descriptor_release(self)) {
        return NULL;
    }
    Py_RETURN_NONE;
}

/* take(other) -> whether this closed one took over the descriptor of `other`, and closed `other` */
static PyObject *
descriptor_take(PyObject *object, PyObject *other_object)
{
    Descriptor *self = (Descriptor *)object, *other = (Descriptor *)other_object;
    if (!Py_IS_TYPE(other_object, Py_TYPE(object))) {
        PyErr_SetString(PyExc_TypeError, "a descriptor takes over another descriptor");
        return NULL;
    }
    pthread_mutex_lock(&descriptors_lock);
    const bool taken = self->fd < 0 && other->fd >= 0;
    if (taken) {
        descriptor_delist(other);
        self->memory = other->memory;
        other->memory = NULL;
        self->forks = other->forks;
        atomic_store_explicit(&self->inherited, false, memory_order_relaxed);
        atomic_store_explicit(&self->fd, other->fd, memory_order_release);
        atomic_store_explicit(&other->fd, -1, memory_order_release);
        descriptor_enlist(self);
    }
    pthread_mutex_unlock(&descriptors_lock);
    return bool_object(taken);
}

static PyObject *
descriptor_get_closed(PyObject *object, void *Py_UNUSED(closure))
{
    return bool_object(
        atomic_load_explicit(&((Descriptor *)object)->fd, memory_order_acquire) < 0);
}

static PyObject *
descriptor_get_inherited(PyObject *object, void *Py_UNUSED(closure))
{
    return bool_object(
        atomic_load_explicit(&((Descriptor *)object)->inherited, memory_order_relaxed));
}

/* leave_inherited(): in a forked child, close every descriptor of the parent. After all are closed,
 * raises the error of one whose memory could not be mapped again. */
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

/* rename_new(source, target): rename a file in one step, unless `target` exists. A hard link and a
 * removal would be two steps, and a process killed between them would leave a file with two names.
 * The number of names must be right: it is how a process notices that a file lost its name. */
static PyObject *
native_rename_new(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *source_path, *target_path, *source = NULL, *target = NULL, *renamed = NULL;
    if (!PyArg_ParseTuple(args, "OO:rename_new", &source_path, &target_path)
        || !PyUnicode_FSConverter(source_path, &source)
        || !PyUnicode_FSConverter(target_path, &target)) {
        goto done;
    }
    /* By its number: not every C library has a function for it. */
    const unsigned int no_replace = 1; /* RENAME_NOREPLACE of linux/fs.h */
    if (syscall(SYS_renameat2, AT_FDCWD, PyBytes_AsString(source), AT_FDCWD, PyBytes_AsString(target),
                no_replace)
        == 0) {
        renamed = Py_NewRef(Py_None);
    }
    else {
        PyErr_SetFromErrnoWithFilenameObjects(PyExc_OSError, source_path, target_path);
    }
done:
    Py_XDECREF(source);
    Py_XDECREF(target);
    return renamed;
}

PyMethodDef descriptor_functions[] = {
    {"rename_new", (PyCFunction)native_rename_new, METH_VARARGS, NULL},
    {"leave_inherited", (PyCFunction)native_leave_inherited, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

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

PyType_Spec descriptor_spec = {
    .name = "shmepoch._native.Descriptor",
    .basicsize = sizeof(Descriptor),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE
             | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = descriptor_slots,
};
