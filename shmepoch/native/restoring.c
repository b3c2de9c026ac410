/* Restoring a stored epoch into fresh memory. */

#include "transition.h"

/* A record to restore. */
typedef struct {
    Record record;
    Key key;
    Parts parts;
} Restored;

static bool
parse_restored(const Epoch *self, PyObject *each, Restored *restored)
{
    Record *record = &restored->record;
    uint64_t *const counts[] = {&record->birth, &record->created_at_ms, &record->completed_at_ms,
                                &record->elapsed_ms};
    const Py_ssize_t places[] = {1, 2, 4, 5};
    if (!check_tuple(each, "what a record holds") || PyTuple_Size(each) != 11) {
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_TypeError, "a record is restored of eleven values");
        }
        return false;
    }
    *record = (Record){0};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        if (!as_count(PyTuple_GetItem(each, places[i]), counts[i])) {
            return false;
        }
    }
    const uint64_t room = self->room.feed_bytes;
    Lengths lengths;
    if (!as_u64(PyTuple_GetItem(each, 0), &record->seq)
        || !as_u64(PyTuple_GetItem(each, 3), &record->started)
        || !parse_key(self, PyTuple_GetItem(each, 6), &restored->key)
        || !parse_bytes(PyTuple_GetItem(each, 7), HEAD_LIMIT, &restored->parts.head, &lengths.head)
        || !parse_bytes(PyTuple_GetItem(each, 8), room, &restored->parts.outcome, &lengths.outcome)
        || !parse_bytes(PyTuple_GetItem(each, 9), SPEC_LIMIT, &restored->parts.rest, &lengths.rest)
        || !parse_bytes(PyTuple_GetItem(each, 10), DETAIL_LIMIT, &restored->parts.detail,
                        &lengths.detail)) {
        return false;
    }
    if (record->started > LAST_COUNT + 1) {
        PyErr_SetString(PyExc_OverflowError, "1 + the time of a start is at most 2**63");
        return false;
    }
    record->id[0] = restored->key.id[0];
    record->id[1] = restored->key.id[1];
    record->lengths = pack_lengths(lengths);
    return true;
}

/* The restoration of one epoch. */
typedef struct {
    Transition base;
    Restored *restored;
    uint64_t count, dropped, last, skipped_after;
    unsigned char *scratch;
} Restoration;

/* Whether the records are in order, and fit the feed together. */
static bool
check_restored(const Restoration *all)
{
    const Epoch *self = all->base.self;
    uint64_t size = 0, before = all->dropped;
    for (uint64_t i = 0; i < all->count; i++) {
        const Record *record = &all->restored[i].record;
        size += record_size(lengths_of(record));
        if (record->seq <= before || record->seq > all->last || size > self->room.feed_bytes) {
            PyErr_SetString(PyExc_ValueError,
                            "records in the order of their sequences, that fit the feed together");
            return false;
        }
        before = record->seq;
    }
    return true;
}

static void
restore_body(void *argument)
{
    Restoration *all = argument;
    Transition *one = &all->base;
    Epoch *self = one->self;
    Control *control = control_of(self);
    uint64_t next = all->dropped + 1, head = 0, held = 0, collected = all->last;
    if (!begin(one)) {
        return;
    }
    if (one->words.watermark != 0 || one->words.registrations != 0) {
        refuse(&one->refusal, "changed", -1, one->words.watermark);
        return;
    }
    publish(index_word(self, all->dropped), head);
    for (uint64_t i = 0; i < all->count; i++) {
        const Restored *each = &all->restored[i];
        const Record *record = &each->record;
        for (; next < record->seq; next++) {
            publish(index_word(self, next), head);
        }
        const uint64_t size = compose_record(*record, &each->parts, all->scratch);
        ring_copy_in(self, head, all->scratch, size);
        publish(index_word(self, record->seq), head | HAS_RECORD);
        publish(retained_word(self, &one->words, record->seq),
                record->birth != 0 ? each->key.fingerprint : FREE);
        head += size;
        next = record->seq + 1;
        if (record->birth != 0) {
            collected = held++ == 0 ? record->seq - 1 : collected;
        }
    }
    for (; next <= all->last; next++) {
        publish(index_word(self, next), head);
    }
    publish(&control->writer.head, head);
    publish(&control->writer.dropped_through, all->dropped);
    publish(&control->writer.collected_through, collected);
    publish(&control->writer.registrations, held);
    publish(&control->header.origin, all->last - held);
    publish(&control->header.skipped_after, all->skipped_after);
    publish(&control->header.skipped_through, all->last);
    commit(self, &control->feed.watermark, all->last);
}

/* restore(records, dropped, last, skipped_after)
 *
 * Writes records into a fresh epoch that no other process has found. Each is (seq, birth,
 * created_at_ms, started, completed_at_ms, elapsed_ms, id, head, outcome, rest, detail), in order
 * and after `dropped`. A sequence through `last` that has no record will never have one; recovery
 * skipped those above `skipped_after`. */
PyObject *
epoch_restore(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Restoration all = {.base.self = (Epoch *)object};
    Epoch *self = all.base.self;
    uint64_t longest = 0;
    if (!has_operations(self) || !check_arity("restore", nargs, 4)
        || !check_tuple(args[0], "records") || !as_u64(args[1], &all.dropped)
        || !as_u64(args[2], &all.last) || !as_u64(args[3], &all.skipped_after)) {
        return NULL;
    }
    if (all.last > LAST_SEQ || all.dropped > all.last || all.skipped_after > all.last
        || all.last - all.dropped > self->shape.index_count) {
        PyErr_SetString(PyExc_ValueError, "no more sequences than the feed holds");
        return NULL;
    }
    all.count = (uint64_t)PyTuple_Size(args[0]);
    all.restored = allocate(all.count, sizeof *all.restored);
    bool made = all.restored != NULL;
    for (uint64_t i = 0; made && i < all.count; i++) {
        made = parse_restored(self, PyTuple_GetItem(args[0], (Py_ssize_t)i), &all.restored[i]);
        longest = made ? larger(longest, record_size(lengths_of(&all.restored[i].record))) : 0;
    }
    made = made && check_restored(&all);
    if (made) {
        all.scratch = allocate(longest, 1);
        made = all.scratch != NULL && run(&all.base, true, restore_body);
    }
    PyMem_Free(all.restored);
    PyMem_Free(all.scratch);
    return made ? Py_NewRef(Py_None) : NULL;
}
