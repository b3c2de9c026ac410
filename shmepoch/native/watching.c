/* Watchers of operations, and collecting those that have ended. */

#include "transition.h"

typedef struct {
    Transition base;
    uint64_t collected, through;
} Collection;

static void
collect_body(void *argument)
{
    Collection *collection = argument;
    Transition *one = &collection->base;
    if (!begin(one)) {
        return;
    }
    if (one->words.collected != collection->collected
        || one->words.watermark < collection->through) {
        refuse(&one->refusal, "changed", -1, one->words.collected);
        return;
    }
    commit(one->self, &control_of(one->self)->writer.collected_through, collection->through);
}

/* collect(collected, through): stops retaining the operations that ended through a sequence.
 * Refused if `collected` has changed since the caller read it. */
PyObject *
epoch_collect(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Collection collection = {.base.self = (Epoch *)object};
    if (!check_arity("collect", nargs, 2) || !as_u64(args[0], &collection.collected)
        || !as_u64(args[1], &collection.through)) {
        return NULL;
    }
    return run_on_operations(&collection.base, true, collect_body) ? Py_NewRef(Py_None) : NULL;
}

/* Counts one more or one less watcher of this participant. */
static void
count_watcher(Epoch *self, uint64_t index, bool more)
{
    const uint64_t participant = writer_participant(self->lock);
    const uint64_t shift = watcher_shift(participant), one = UINT64_C(1) << shift;
    word_t *word = watcher_word(slot_at(self, index), participant);
    const uint64_t counts = load(word), count = counts >> shift & UINT16_MAX;
    uint64_t counted = counts;
    if (more && count < UINT16_MAX) {
        counted = counts + one;
    }
    else if (!more && count > 0) {
        counted = counts - one;
    }
    commit(self, word, counted);
}

typedef struct {
    Transition base;
    Key key;
    uint64_t slot, birth;
} Watch;

static void
watch_body(void *argument)
{
    Watch *watch = argument;
    Transition *one = &watch->base;
    const int64_t slot = begin(one) ? find_allowed(one, &watch->key, UINT64_MAX, 0) : -1;
    if (slot >= 0) {
        watch->slot = (uint64_t)slot;
        watch->birth = load(&slot_at(one->self, watch->slot)->birth);
        count_watcher(one->self, watch->slot, true);
    }
}

/* watch(id) -> (slot, birth, watermark): counts one more watcher of an operation that has not ended */
PyObject *
epoch_watch(PyObject *object, PyObject *id)
{
    Watch watch = {.base.self = (Epoch *)object};
    if (!parse_key(watch.base.self, id, &watch.key) || !run_on_operations(&watch.base, true, watch_body)) {
        return NULL;
    }
    return Py_BuildValue("(KKK)", (unsigned long long)watch.slot, (unsigned long long)watch.birth,
                         (unsigned long long)watch.base.words.watermark);
}

typedef struct {
    uint64_t slot, birth;
    bool counted;
} Watched;

typedef struct {
    Transition base;
    Watched *watched;
    uint64_t count;
    bool more;
} Watchers;

static void
watch_each_body(void *argument)
{
    Watchers *all = argument;
    Transition *one = &all->base;
    Epoch *self = one->self;
    word_t *intent = &control_of(self)->writer.intent;
    if (!begin(one)) {
        return;
    }
    if (!all->more) {
        publish(intent, 1); /* a slot may become free, too */
    }
    for (uint64_t i = 0; i < all->count; i++) {
        const uint64_t index = all->watched[i].slot;
        const Slot *slot = slot_at(self, index);
        if (load(&slot->birth) != all->watched[i].birth
            || load(&fingerprints_of(self)[index]) == FREE) {
            continue; /* another operation has the slot now */
        }
        const bool ended = has_ended(slot, &one->words);
        if (all->more && ended) {
            continue;
        }
        count_watcher(self, index, all->more);
        all->watched[i].counted = true;
        if (ended && !is_watched(self, slot)) {
            free_slot(self, index);
        }
    }
    publish(intent, 0);
}

/* watch_each(((slot, birth), ...), more) -> whether each was counted
 *
 * Counts one more watcher of each operation that has not ended, or one less of each operation. The
 * slot of an ended operation becomes free with its last watcher. Refused as busy if it would have
 * to wait. */
PyObject *
epoch_watch_each(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Watchers all = {.base.self = (Epoch *)object};
    if (!check_arity("watch_each", nargs, 2) || !check_tuple(args[0], "slots and births")) {
        return NULL;
    }
    const int more = PyObject_IsTrue(args[1]);
    all.more = more > 0;
    all.count = (uint64_t)PyTuple_Size(args[0]);
    all.watched = allocate(all.count, sizeof *all.watched);
    bool made = more >= 0 && all.watched != NULL;
    for (uint64_t i = 0; made && i < all.count; i++) {
        PyObject *each = PyTuple_GetItem(args[0], (Py_ssize_t)i);
        made = check_tuple(each, "a slot and a birth") && PyTuple_Size(each) == 2
               && parse_index(all.base.self, PyTuple_GetItem(each, 0), &all.watched[i].slot)
               && as_u64(PyTuple_GetItem(each, 1), &all.watched[i].birth);
        if (!made && !PyErr_Occurred()) {
            PyErr_SetString(PyExc_TypeError, "a tuple of a slot and a birth");
        }
    }
    made = made && run_on_operations(&all.base, false, watch_each_body);
    PyObject *counted_each = made ? PyTuple_New((Py_ssize_t)all.count) : NULL;
    for (uint64_t i = 0; counted_each != NULL && i < all.count; i++) {
        PyTuple_SetItem(counted_each, (Py_ssize_t)i, bool_object(all.watched[i].counted));
    }
    PyMem_Free(all.watched);
    return counted_each;
}
