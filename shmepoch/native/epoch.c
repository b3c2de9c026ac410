/* Epoch: each transition of a segment's operations, once.
 *
 * A transition is one call that takes the writer lock itself. Under the lock it begins (checks that
 * the epoch is open, and repairs what a killed writer left), validates, prepares words that readers
 * do not count yet, commits by one store, and tidies. It is refused with a reason and facts; a
 * refused one changes nothing.
 *
 * OPS-4: a transition becomes true by exactly one atomic store: of the watermark for those that end
 * operations, of `registrations` for a registration, of the slot's word or the watcher's count for the
 * rest. The first two prepare several words; an intent word says so. The next writer that finds it
 * undoes what was not committed.
 */

#include "transition.h"

#include <sys/mman.h>

bool
seal(Transition *one)
{
    word_t *state = &control_of(one->self)->header.state;
    if (load_published(state) == STATE_GONE) {
        return refuse(&one->refusal, "ended", -1, 0);
    }
    commit(one->self, state, STATE_SEALED);
    return true;
}

static void
seal_body(void *argument)
{
    seal(argument);
}

/* seal(): ends the epoch for good. It reads no other word, so that a damaged epoch can be
 * sealed. */
static PyObject *
epoch_seal(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    Transition one = {.self = (Epoch *)object};
    return run(&one, true, seal_body) ? Py_NewRef(Py_None) : NULL;
}

typedef struct {
    Transition base;
    const Memory *copy;
} Copy;

static void
copy_body(void *argument)
{
    Copy *copy = argument;
    const Memory *memory = copy->base.self->memory;
    if (copy->base.self->room.max_operations == 0 || mend(&copy->base)) {
        copy_out(word_at(memory, 0), copy->copy->base, (uint64_t)memory->size);
    }
}

/* copy() -> private memory like this epoch's at one moment, after a repair */
static PyObject *
epoch_copy(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    Copy copy = {.base.self = (Epoch *)object};
    ModuleState *state = PyType_GetModuleState(Py_TYPE(object));
    PyObject *made = memory_map(state->memory_type, -1, copy.base.self->memory->size,
                                MAP_PRIVATE | MAP_ANONYMOUS);
    if (made == NULL) {
        return NULL;
    }
    copy.copy = (const Memory *)made;
    if (!run(&copy.base, true, copy_body)) {
        Py_CLEAR(made);
    }
    return made;
}

/* --- the type ------------------------------------------------------------------------------------- */

static PyObject *
epoch_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"memory",         "lock",       "max_completed",
                               "max_concurrent", "max_operations", "feed_bytes",
                               "max_participants", "store_wait_ms", NULL};
    PyObject *memory, *lock, *given[6];
    uint64_t words[6];
    ModuleState *state = PyType_GetModuleState(type);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOOOOO:Epoch", keywords, &memory, &lock,
                                     &given[0], &given[1], &given[2], &given[3], &given[4],
                                     &given[5])) {
        return NULL;
    }
    if (!PyObject_TypeCheck(memory, state->memory_type)
        || (lock != Py_None && !PyObject_TypeCheck(lock, state->writer_type))) {
        PyErr_SetString(PyExc_TypeError, "an Epoch lies in a Memory and has a WriterLock or None");
        return NULL;
    }
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        if (!as_u64(given[i], &words[i])) {
            return NULL;
        }
    }
    const Capacities room = {words[0], words[2], words[3], words[4]};
    const bool none = room.max_completed == 0 && room.max_operations == 0 && room.feed_bytes == 0;
    const bool some = room.max_completed > 0 && room.max_operations > 0
                      && room.feed_bytes >= sizeof(Record);
    Shape shape;
    if (!(none || some) || room.max_participants == 0 || !shape_of(&room, &shape)
        || shape.size > (uint64_t)((Memory *)memory)->size) {
        return PyErr_Format(PyExc_ValueError, "no epoch of these capacities lies in %zd bytes",
                            ((Memory *)memory)->size);
    }
    allocfunc allocate_object = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Epoch *self = (Epoch *)allocate_object(type, 0);
    if (self != NULL) {
        self->memory = (Memory *)Py_NewRef(memory);
        self->lock = lock == Py_None ? NULL : (WriterLock *)Py_NewRef(lock);
        self->room = room;
        self->max_concurrent = words[1];
        self->shape = shape;
    }
    return (PyObject *)self;
}

static int
epoch_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT((PyObject *)((Epoch *)object)->lock);
    return 0;
}

/* There is no tp_clear: the lock clears what can be part of a cycle. */
static void
epoch_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    Epoch *self = (Epoch *)object;
    PyObject_GC_UnTrack(object);
    Py_XDECREF((PyObject *)self->memory);
    Py_XDECREF((PyObject *)self->lock);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

#ifdef SHMEPOCH_AUDIT
static PyObject *
epoch_get_commits(PyObject *object, void *Py_UNUSED(closure))
{
    return from_u64(atomic_load_explicit(&((Epoch *)object)->commits, memory_order_relaxed));
}

static PyGetSetDef epoch_attributes[] = {
    {"commits", epoch_get_commits, NULL, "How often this object has made something true.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
#endif

static PyMethodDef epoch_methods[] = {
    {"register", (PyCFunction)(void (*)(void))epoch_register, METH_FASTCALL, NULL},
    {"start", (PyCFunction)(void (*)(void))epoch_start, METH_FASTCALL, NULL},
    {"change", (PyCFunction)(void (*)(void))epoch_change, METH_FASTCALL, NULL},
    {"end", (PyCFunction)(void (*)(void))epoch_end, METH_FASTCALL, NULL},
    {"terminate", (PyCFunction)(void (*)(void))epoch_terminate, METH_FASTCALL, NULL},
    {"seal", (PyCFunction)epoch_seal, METH_NOARGS, NULL},
    {"collect", (PyCFunction)(void (*)(void))epoch_collect, METH_FASTCALL, NULL},
    {"watch", (PyCFunction)epoch_watch, METH_O, NULL},
    {"watch_each", (PyCFunction)(void (*)(void))epoch_watch_each, METH_FASTCALL, NULL},
    {"copy", (PyCFunction)epoch_copy, METH_NOARGS, NULL},
    {"restore", (PyCFunction)(void (*)(void))epoch_restore, METH_FASTCALL, NULL},
    {"words", (PyCFunction)epoch_words, METH_NOARGS, NULL},
    {"active", (PyCFunction)epoch_active, METH_NOARGS, NULL},
    {"find", (PyCFunction)epoch_find, METH_O, NULL},
    {"used", (PyCFunction)epoch_used, METH_NOARGS, NULL},
    {"slot", (PyCFunction)epoch_slot, METH_O, NULL},
    {"record", (PyCFunction)epoch_record, METH_O, NULL},
    {"list_since", (PyCFunction)(void (*)(void))epoch_list_since, METH_FASTCALL, NULL},
    {"outcome", (PyCFunction)(void (*)(void))epoch_outcome, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot epoch_slots[] = {
    {Py_tp_doc, "Epoch(memory, lock, ...): the operations and the feed of one segment; see "
                "_native.pyi."},
    {Py_tp_new, epoch_new},
    {Py_tp_dealloc, epoch_dealloc},
    {Py_tp_traverse, epoch_traverse},
    {Py_tp_methods, epoch_methods},
#ifdef SHMEPOCH_AUDIT
    {Py_tp_getset, epoch_attributes},
#endif
    {0, NULL},
};

PyType_Spec epoch_spec = {
    .name = "shmepoch._native.Epoch",
    .basicsize = sizeof(Epoch),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = epoch_slots,
};
