/* The completion feed, read without a lock.
 *
 * An entry is made of a record's values and a template: the bytes that come before the sequence,
 * the id, the head, the outcome and the time. So a record holds no keys, and nothing here reads
 * MessagePack.
 */

#include "transition.h"

#define ARRAY_HEADER 5 /* MessagePack's array32: one byte, then a 32-bit big-endian count */
#define ENTRY_PARTS 5

typedef struct {
    const char *part[ENTRY_PARTS];
    uint64_t length[ENTRY_PARTS];
    uint64_t size; /* of the template and the values of fixed length */
} Template;

static bool
parse_template(PyObject *tuple, Template *template)
{
    if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != ENTRY_PARTS) {
        PyErr_Format(PyExc_TypeError, "an entry's template is a tuple of %d bytes", ENTRY_PARTS);
        return false;
    }
    template->size = WORD + 2 * WORD + WORD;
    for (int i = 0; i < ENTRY_PARTS; i++) {
        char *part;
        Py_ssize_t length;
        if (PyBytes_AsStringAndSize(PyTuple_GetItem(tuple, i), &part, &length) < 0) {
            return false;
        }
        template->part[i] = part;
        template->length[i] = (uint64_t)length;
        template->size += (uint64_t)length;
    }
    return true;
}

static uint64_t
entry_size(const Template *template, const Record *record)
{
    const Lengths of = lengths_of(record);
    return template->size + of.head + of.outcome;
}

static unsigned char *
append(unsigned char *target, const void *source, uint64_t length)
{
    memcpy(target, source, length);
    return target + length;
}

static unsigned char *
append_big_endian(unsigned char *target, uint64_t value)
{
    for (int byte = 0; byte < WORD; byte++) {
        target[byte] = (unsigned char)(value >> (56 - 8 * byte));
    }
    return target + WORD;
}

/* The size of each entry: 0 for a skipped one, -1 for one that is not there. Returns the sum for as
 * many records as the ring can hold. */
static uint64_t
measure(const Epoch *self, const Template *template, uint64_t first, uint64_t count,
        int64_t *sizes)
{
    uint64_t total = 0, records = 0;
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t word = load_published(index_word(self, first + i));
        Record record;
        sizes[i] = 0;
        if (!(word & HAS_RECORD)) {
            continue;
        }
        if (!load_record(self, position_in(word), first + i, &record)) {
            sizes[i] = -1;
            continue;
        }
        sizes[i] = (int64_t)entry_size(template, &record);
        records += record_size(lengths_of(&record));
        /* Records that exist together fit the ring. More than that are of different rounds. */
        total += records <= self->room.feed_bytes ? (uint64_t)sizes[i] : 0;
    }
    return total;
}

/* Makes the entry of a sequence, if its record is whole and the entry has this size. */
static bool
take_entry(const Epoch *self, const Template *template, uint64_t seq, uint64_t size,
           unsigned char *target)
{
    const uint64_t word = load_published(index_word(self, seq));
    const uint64_t position = position_in(word);
    Record record;
    if (!(word & HAS_RECORD) || !load_record(self, position, seq, &record)
        || entry_size(template, &record) != size) {
        return false;
    }
    const Lengths of = lengths_of(&record);
    target = append(target, template->part[0], template->length[0]);
    target = append_big_endian(target, seq);
    target = append(target, template->part[1], template->length[1]);
    target = append(target, record.id, sizeof record.id);
    target = append(target, template->part[2], template->length[2]);
    /* Both values are copied at once, and the first is moved to its place. */
    unsigned char *values = target + template->length[3];
    ring_copy_out(self, position + sizeof record, values, of.head + of.outcome);
    if (!is_whole_first(&record, values)) {
        return false;
    }
    memmove(target, values, of.head);
    append(target + of.head, template->part[3], template->length[3]);
    target = values + of.head + of.outcome;
    target = append(target, template->part[4], template->length[4]);
    append_big_endian(target, record.completed_at_ms);
    return true;
}

/* The result of one pass of `list_since`. */
typedef struct {
    uint64_t first, watermark, dropped;
    uint64_t first_whole; /* overwriting goes from the oldest on: a torn record voids those before it */
    PyObject *data;
} Pass;

/* The entries first..watermark, adjacent, behind a MessagePack array header: one decode reads them all.
 * False with an error set. */
static bool
gather(const Epoch *self, const Template *template, Pass *pass)
{
    const uint64_t count = pass->watermark - pass->first + 1;
    int64_t *sizes = PyMem_Malloc((size_t)count * sizeof *sizes);
    if (sizes == NULL) {
        PyErr_NoMemory();
        return false;
    }
    const uint64_t total = measure(self, template, pass->first, count, sizes);
    pass->data = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(ARRAY_HEADER + total));
    if (pass->data == NULL) {
        PyMem_Free(sizes);
        return false;
    }
    unsigned char *start = (unsigned char *)PyBytes_AsString(pass->data);
    uint64_t used = 0;
    pass->first_whole = pass->first;
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t seq = pass->first + i;
        if (sizes[i] > 0 && (uint64_t)sizes[i] <= total - used
            && take_entry(self, template, seq, (uint64_t)sizes[i], start + ARRAY_HEADER + used)) {
            used += (uint64_t)sizes[i];
        }
        else if (sizes[i] != 0) {
            used = 0;
            pass->first_whole = seq + 1;
        }
    }
    atomic_thread_fence(memory_order_acquire);
    pass->dropped = load(&control_of(self)->writer.dropped_through);
    /* Entries that were dropped meanwhile are left out, too. */
    uint64_t passed = 0, entries = 0;
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t seq = pass->first + i;
        if (seq < pass->first_whole || sizes[i] <= 0) {
            continue;
        }
        if (seq <= pass->dropped) {
            passed += (uint64_t)sizes[i];
        }
        else {
            entries++;
        }
    }
    PyMem_Free(sizes);
    memmove(start + ARRAY_HEADER, start + ARRAY_HEADER + passed, (size_t)(used - passed));
    start[0] = 0xdd;
    for (int byte = 0; byte < 4; byte++) {
        start[1 + byte] = (unsigned char)(entries >> (24 - 8 * byte));
    }
    if (used - passed < total) {
        PyObject *shorter = PyBytes_FromStringAndSize((const char *)start,
                                                      (Py_ssize_t)(ARRAY_HEADER + used - passed));
        Py_DECREF(pass->data);
        pass->data = shorter;
    }
    return pass->data != NULL;
}

/* list_since(after, template) -> (watermark, dropped, entries), the retained ones above `after`, or None
 *
 * FEED-1: no entry is above the watermark, and none at or below it is missing unless it was dropped. */
PyObject *
epoch_list_since(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Epoch *self = (Epoch *)object;
    const Control *control = control_of(self);
    Refusal refusal;
    Template template;
    uint64_t after;
    if (!has_operations(self) || !check_arity("list_since", nargs, 2) || !as_u64(args[0], &after)
        || !parse_template(args[1], &template)) {
        return NULL;
    }
    for (int turn = 0; turn < PASSES; turn++) {
        Pass pass = {.watermark = load_published(&control->feed.watermark)};
        pass.dropped = load_published(&control->writer.dropped_through);
        if (pass.dropped > pass.watermark) {
            /* The writer has gone round the ring meanwhile; its watermark must have, too. */
            const uint64_t now = load_published(&control->feed.watermark);
            if (pass.dropped > now) {
                corrupt(&refusal, "dropped_through", -1, 0, now, pass.dropped);
                return raise_refused(object, &refusal);
            }
            continue;
        }
        if (pass.watermark - pass.dropped > self->shape.index_count || pass.watermark > LAST_SEQ) {
            corrupt(&refusal, "watermark", -1, 0, pass.dropped + self->shape.index_count,
                    pass.watermark);
            return raise_refused(object, &refusal);
        }
        pass.first = larger(after, pass.dropped) + 1;
        if (after >= pass.watermark || pass.first > pass.watermark) {
            return Py_BuildValue("(KKs)", (unsigned long long)pass.watermark,
                                 (unsigned long long)pass.dropped, NULL);
        }
        if (!gather(self, &template, &pass)) {
            return NULL;
        }
        if (pass.first_whole > larger(pass.first, pass.dropped + 1)) {
            Py_DECREF(pass.data);
            corrupt(&refusal, "feed.record", (int64_t)pass.first_whole - 1, pass.first_whole - 1,
                    pass.first_whole - 1, 0);
            return raise_refused(object, &refusal);
        }
        if (pass.dropped <= pass.watermark) {
            return Py_BuildValue("(KKN)", (unsigned long long)pass.watermark,
                                 (unsigned long long)pass.dropped, pass.data);
        }
        Py_DECREF(pass.data);
    }
    PyErr_SetString(PyExc_RuntimeError, "writers went round the feed faster than it was read");
    return NULL;
}
