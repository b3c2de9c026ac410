/* How each transition begins, is run and commits, and how it finds its operations. */

#include "transition.h"

void
commit(Epoch *self, word_t *word, uint64_t value)
{
#ifdef SHMEPOCH_AUDIT
    atomic_fetch_add_explicit(&self->commits, 1, memory_order_relaxed);
#else
    (void)self;
#endif
    publish(word, value);
}

bool
mend(Transition *one)
{
    Epoch *self = one->self;
    if (!load_words(self, &one->words, &one->refusal)
        || !check_words(self, &one->words, &one->refusal)) {
        return false;
    }
    return load(&control_of(self)->writer.intent) == 0 || repair(self, &one->words, &one->refusal);
}

bool
begin(Transition *one)
{
    if (load_published(&control_of(one->self)->header.state) != STATE_OPEN) {
        return refuse(&one->refusal, "ended", -1, 0);
    }
    return mend(one);
}

PyObject *
raise_refused(PyObject *epoch, const Refusal *refusal)
{
    ModuleState *state = PyType_GetModuleState(Py_TYPE(epoch));
    PyObject *facts = Py_BuildValue(
        "(ssLKKK)", refusal->reason, refusal->field, (long long)refusal->index,
        (unsigned long long)refusal->least, (unsigned long long)refusal->most,
        (unsigned long long)refusal->actual);
    if (facts != NULL) {
        PyErr_SetObject(state->refused, facts);
        Py_DECREF(facts);
    }
    return NULL;
}

bool
run(Transition *one, bool wait, void (*body)(void *))
{
    PyObject *epoch = (PyObject *)one->self;
    RunState state = RUN_DONE;
    if (one->self->lock != NULL
        && lane_of(writer_participant(one->self->lock)) >= one->self->room.max_participants) {
        PyErr_Format(PyExc_ValueError, "no participant %llu",
                     (unsigned long long)writer_participant(one->self->lock));
        return false;
    }
    one->refusal.reason = NULL;
    if (one->self->lock == NULL) {
        refuse(&one->refusal, "read_only", -1, 0);
    }
    else {
        state = writer_run(one->self->lock, wait, body, one);
    }
    if (state == RUN_FAILED) {
        return false;
    }
    if (state == RUN_BUSY) {
        refuse(&one->refusal, "busy", -1, 0);
    }
    if (one->refusal.reason != NULL) {
        raise_refused(epoch, &one->refusal);
    }
    return one->refusal.reason == NULL;
}

bool
run_on_operations(Transition *one, bool wait, void (*body)(void *))
{
    return has_operations(one->self) && run(one, wait, body);
}

/* --- arguments ---------------------------------------------------------------------------------- */

bool
check_tuple(PyObject *object, const char *of)
{
    if (!PyTuple_Check(object)) {
        PyErr_Format(PyExc_TypeError, "a tuple of %s, not %R", of, object);
        return false;
    }
    return true;
}

bool
parse_bytes(PyObject *object, uint64_t limit, const unsigned char **data, uint64_t *length)
{
    char *start;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(object, &start, &size) < 0) {
        return false;
    }
    if ((uint64_t)size > limit) {
        PyErr_Format(PyExc_ValueError, "%zd bytes where there is room for %llu", size,
                     (unsigned long long)limit);
        return false;
    }
    *data = (const unsigned char *)start;
    *length = (uint64_t)size;
    return true;
}

bool
parse_index(const Epoch *self, PyObject *object, uint64_t *index)
{
    if (!as_u64(object, index)) {
        return false;
    }
    if (*index >= self->room.max_operations) {
        PyErr_Format(PyExc_IndexError, "no slot %llu: there are %llu", (unsigned long long)*index,
                     (unsigned long long)self->room.max_operations);
        return false;
    }
    return true;
}

void *
allocate(uint64_t count, size_t size)
{
    void *made = PyMem_Calloc(count > 0 ? (size_t)count : 1, size);
    if (made == NULL) {
        PyErr_NoMemory();
    }
    return made;
}

/* --- the operations that a transition is about -------------------------------------------------- */

int64_t
find_allowed(Transition *one, const Key *key, uint64_t statuses, int64_t index)
{
    Place place;
    if (!find_operation(one->self, &one->words, key, &place, &one->refusal)) {
        return -1;
    }
    if (place.seq != 0) {
        refuse(&one->refusal, "has_ended", index, place.seq);
        return -1;
    }
    if (place.slot < 0) {
        refuse(&one->refusal, "not_found", index, 0);
        return -1;
    }
    const Slot *slot = slot_at(one->self, (uint64_t)place.slot);
    const uint64_t status = status_of(load(&slot->word));
    if ((statuses >> status & 1) == 0) {
        refuse(&one->refusal, "wrong_status", index, status);
        return -1;
    }
    return place.slot;
}

bool
find_subjects(Subjects *all)
{
    for (uint64_t i = 0; i < all->count; i++) {
        const int64_t slot =
            find_allowed(&all->base, &all->subjects[i].key, all->statuses, (int64_t)i);
        if (slot < 0) {
            return false;
        }
        if (all->seen[slot] != 0) {
            return refuse(&all->base.refusal, "twice", (int64_t)i, 0);
        }
        all->seen[slot] = 1;
        all->subjects[i].slot = (uint64_t)slot;
    }
    return true;
}

bool
allocate_subjects(Subjects *all, uint64_t count)
{
    all->count = count;
    all->subjects = allocate(count, sizeof *all->subjects);
    all->seen = allocate(all->base.self->room.max_operations, 1);
    return all->subjects != NULL && all->seen != NULL;
}

void
free_subjects(Subjects *all)
{
    PyMem_Free(all->subjects);
    PyMem_Free(all->seen);
}
