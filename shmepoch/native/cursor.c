/* Words that only grow: Cell, one of them behind a flag that closes it, and Snapshots, several
 * of them read at one instant. */

#include "common.h"

/* --- Cell ------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    PyObject *memory; /* keeps the mapping alive */
    word_t *word;
    word_t *closed_flag;
    PyObject *on_closed;
} Cell;

static PyObject *
cell_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"memory", "offset", "closed_flag", "on_closed", NULL};
    PyObject *memory, *on_closed;
    Py_ssize_t offset, closed_flag;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OnnO:Cell", keywords, &memory, &offset, &closed_flag,
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
    if (!check_word((Memory *)memory, offset) || !check_word((Memory *)memory, closed_flag)) {
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Cell *self = (Cell *)allocate(type, 0);
    if (self != NULL) {
        Py_INCREF(memory);
        Py_INCREF(on_closed);
        self->memory = memory;
        self->word = word_at((Memory *)memory, offset);
        self->closed_flag = word_at((Memory *)memory, closed_flag);
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

/* Clears only what can be part of a cycle. The memory stays until the cell itself is freed, so a
 * cell that is used while its cycle is collected still has its mapping. */
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
    if (atomic_load_explicit(self->closed_flag, memory_order_acquire) == 0) {
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
 * Acquire-release: a reader of the new position also sees everything that this process did before
 * it advanced. */
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
/* An empty call with one argument: the floor that bench/ compares `advance` with. */
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

PyType_Spec cell_spec = {
    .name = "shmepoch._native.Cell",
    .basicsize = sizeof(Cell),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = cell_slots,
};

/* --- Snapshots -------------------------------------------------------------------------------- */

#define SNAPSHOT_MAX 8
/* Far more passes than writers that take turns can spoil. It ends the loop on memory that changes
 * all the time. */
#define SNAPSHOT_PASSES 1000

/* Words that only grow, as they stood at one instant: two equal passes mean that no word moved
 * between its two reads, so all had these values together at the end of the first pass. Acquire
 * keeps the passes apart. After SNAPSHOT_PASSES each word is from some instant of the call, and no
 * older. */
static void
load_at_once(const Memory *self, Py_ssize_t offset, Py_ssize_t count, Py_ssize_t stride,
             uint64_t *words)
{
    bool moved = true; /* the first pass has no earlier pass to compare with */
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

typedef struct {
    PyObject_HEAD
    Memory *memory;
    PyObject *make; /* makes a snapshot from its words */
    Py_ssize_t offset, count, stride;
    /* The last snapshot. It is immutable, and is returned again until a word has moved. Not used
     * without the interpreter lock: two threads would race to replace it. */
    PyObject *last;
    uint64_t last_words[SNAPSHOT_MAX];
} Snapshots;

/* snapshots(offset, count, stride, make) -> Snapshots. The arguments of its `take` are parsed and
 * checked here, once; `make` returns something immutable. */
PyObject *
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

PyType_Spec snapshots_spec = {
    .name = "shmepoch._native.Snapshots",
    .basicsize = sizeof(Snapshots),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE
             | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = snapshots_slots,
};
