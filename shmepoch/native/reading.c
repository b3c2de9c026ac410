/* Operations, read without a lock: writers do not delay readers, and readers do not delay writers.
 * A reader notices when its copy was overwritten meanwhile, and copies again or leaves the value
 * out.
 */

#include "transition.h"

/* words() -> (registrations, watermark, origin, skipped_after, skipped_through, dropped, collected,
 * floor) */
PyObject *
epoch_words(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    Words words;
    Refusal refusal;
    if (!has_operations((Epoch *)object)) {
        return NULL;
    }
    if (!load_words((Epoch *)object, &words, &refusal)) {
        return raise_refused(object, &refusal);
    }
    return Py_BuildValue("(KKKKKKKK)", (unsigned long long)words.registrations,
                         (unsigned long long)words.watermark, (unsigned long long)words.origin,
                         (unsigned long long)words.skipped_after,
                         (unsigned long long)words.skipped_through,
                         (unsigned long long)words.dropped, (unsigned long long)words.collected,
                         (unsigned long long)words.floor);
}

/* active() -> how many operations have not ended: the registrations less the completions */
PyObject *
epoch_active(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    const Epoch *self = (const Epoch *)object;
    Words words;
    Refusal refusal;
    if (!has_operations(self)) {
        return NULL;
    }
    do {
        if (!load_words(self, &words, &refusal)) {
            return raise_refused(object, &refusal);
        }
        /* Otherwise operations may have been registered and have ended since it was loaded. */
    } while (load_published(&control_of(self)->writer.registrations) != words.registrations);
    if (words.active > self->room.max_operations) {
        corrupt(&refusal, "registrations less completions", -1, 0, self->room.max_operations,
                words.active);
        return raise_refused(object, &refusal);
    }
    return from_u64(words.active);
}

/* find(id) -> (slot, 0), or (-1, seq) of an operation that has ended, or None */
PyObject *
epoch_find(PyObject *object, PyObject *id)
{
    Epoch *self = (Epoch *)object;
    Words words;
    Refusal refusal;
    Key key;
    Place place;
    if (!has_operations(self) || !parse_key(self, id, &key)) {
        return NULL;
    }
    do {
        if (!load_words(self, &words, &refusal)) {
            return raise_refused(object, &refusal);
        }
        if (!find_operation(self, &words, &key, &place, &refusal)) {
            return raise_refused(object, &refusal);
        }
        /* Otherwise it may have ended during the search, and have left its slot before the search
         * got there. */
    } while (place.slot < 0 && place.seq == 0
             && load_published(&control_of(self)->feed.watermark) != words.watermark);
    if (place.slot < 0 && place.seq == 0) {
        Py_RETURN_NONE;
    }
    return Py_BuildValue("(LK)", (long long)place.slot, (unsigned long long)place.seq);
}

/* used() -> the slots that hold an operation */
PyObject *
epoch_used(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    const Epoch *self = (const Epoch *)object;
    PyObject *list = PyList_New(0);
    for (uint64_t index = 0; list != NULL && index < self->room.max_operations; index++) {
        if (load_published(&fingerprints_of(self)[index]) == FREE) {
            continue;
        }
        PyObject *number = from_u64(index);
        if (number == NULL || PyList_Append(list, number) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(number);
    }
    return list;
}

/* --- one slot ------------------------------------------------------------------------------------ */

/* A copy of a slot. */
typedef struct {
    uint64_t word, birth, terminal_seq, id[2], participant, created_at_ms, created_mono_ns,
        started, position, spec_lengths, detail_length, watchers;
    unsigned char spec[SPEC_LIMIT], detail[DETAIL_LIMIT];
} CopiedSlot;

/* The slot's word changes before the fields that it covers are overwritten, so an equal word means
 * that the copy is of one moment. False with an error set. */
static bool
copy_slot(Epoch *self, uint64_t index, CopiedSlot *copy)
{
    const Slot *slot = slot_at(self, index);
    Words words;
    Refusal refusal;
    uint64_t again;
    bool sound;
    do {
        if (!load_words(self, &words, &refusal)) {
            raise_refused((PyObject *)self, &refusal);
            return false;
        }
        copy->word = load_published(&slot->word);
        sound = check_slot(self, index, &refusal);
        copy->birth = load(&slot->birth);
        copy->terminal_seq = load(&slot->terminal_seq);
        copy->id[0] = load(&slot->id[0]);
        copy->id[1] = load(&slot->id[1]);
        copy->participant = load(&slot->participant);
        copy->created_at_ms = load(&slot->created_at_ms);
        copy->created_mono_ns = load(&slot->created_mono_ns);
        copy->started = load(&slot->started);
        copy->position = load(&slot->position);
        copy->spec_lengths = load(&slot->spec_lengths);
        copy->detail_length = load(&slot->detail_length[buffer_of(copy->word)]);
        copy->watchers = 0;
        for (uint64_t i = 0; i < watcher_words(self); i++) {
            for (uint64_t lanes = load(&slot->watchers[i]); lanes != 0; lanes >>= 16) {
                copy->watchers += lanes & UINT16_MAX;
            }
        }
        const uint64_t spec = head_length(copy->spec_lengths) + rest_length(copy->spec_lengths);
        if (sound && spec <= SPEC_LIMIT && copy->detail_length <= DETAIL_LIMIT) {
            copy_out(slot->spec, copy->spec, spec);
            copy_out(slot->details[buffer_of(copy->word)], copy->detail, copy->detail_length);
        }
        atomic_thread_fence(memory_order_acquire);
        again = load(&slot->word);
    } while (again != copy->word);
    if (!sound) {
        raise_refused((PyObject *)self, &refusal);
        return false;
    }
    /* Leave out what was not committed when the words were loaded. */
    if (copy->birth > words.registrations) {
        copy->birth = 0;
    }
    if (copy->terminal_seq > words.watermark) {
        copy->terminal_seq = 0;
    }
    if (status_of(copy->word) == STATUS_PROVISIONING) {
        copy->started = 0; /* it is about to start */
    }
    return true;
}

/* slot(index) -> (word, birth, terminal_seq, id, participant, created_at_ms, created_mono_ns,
 * started, head, rest, detail, watchers), or None if it holds no operation */
PyObject *
epoch_slot(PyObject *object, PyObject *index_object)
{
    Epoch *self = (Epoch *)object;
    uint64_t index;
    CopiedSlot copy;
    if (!parse_index(self, index_object, &index) || !copy_slot(self, index, &copy)) {
        return NULL;
    }
    if (copy.birth == 0 || status_of(copy.word) == STATUS_ABSENT) {
        Py_RETURN_NONE;
    }
    const uint64_t head = head_length(copy.spec_lengths), rest = rest_length(copy.spec_lengths);
    return Py_BuildValue(
        "(KKKy#KKKKy#y#y#K)", (unsigned long long)copy.word, (unsigned long long)copy.birth,
        (unsigned long long)copy.terminal_seq, (const char *)copy.id, (Py_ssize_t)sizeof copy.id,
        (unsigned long long)copy.participant, (unsigned long long)copy.created_at_ms,
        (unsigned long long)copy.created_mono_ns, (unsigned long long)copy.started,
        (const char *)copy.spec, (Py_ssize_t)head, (const char *)copy.spec + head, (Py_ssize_t)rest,
        (const char *)copy.detail, (Py_ssize_t)copy.detail_length,
        (unsigned long long)copy.watchers);
}

/* --- one record ---------------------------------------------------------------------------------- */

/* The result of copying a record. */
typedef enum { RECORD_TAKEN, RECORD_TORN, RECORD_ERROR } RecordState;

/* The record of a sequence at a position. `data` becomes one bytes object with both parts. */
static RecordState
take_record(const Epoch *self, uint64_t position, uint64_t seq, Record *record, PyObject **data)
{
    if (!load_record(self, position, seq, record)) {
        return RECORD_TORN;
    }
    const Lengths lengths = lengths_of(record);
    const uint64_t size = record_size(lengths) - sizeof *record;
    *data = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);
    if (*data == NULL) {
        return RECORD_ERROR;
    }
    unsigned char *first = (unsigned char *)PyBytes_AsString(*data);
    ring_copy_out(self, position + sizeof *record, first, size);
    atomic_thread_fence(memory_order_acquire);
    if (is_whole_first(record, first)
        && is_whole_second(record, first + padded(lengths.head + lengths.outcome))) {
        return RECORD_TAKEN;
    }
    Py_CLEAR(*data);
    return RECORD_TORN;
}

/* The record of a committed sequence, in `data`: NULL if it was dropped, or skipped by recovery.
 * False with an error set. */
static bool
take_retained(Epoch *self, uint64_t seq, Record *record, PyObject **data)
{
    const Control *control = control_of(self);
    Refusal refusal;
    *data = NULL;
    const uint64_t word = load_published(index_word(self, seq));
    RecordState state = RECORD_TORN;
    if (seq > load_published(&control->writer.dropped_through) && (word & HAS_RECORD)) {
        state = take_record(self, position_in(word), seq, record, data);
    }
    atomic_thread_fence(memory_order_acquire);
    if (state == RECORD_ERROR) {
        return false;
    }
    if (seq <= load(&control->writer.dropped_through)) {
        Py_CLEAR(*data);
    }
    else if (state == RECORD_TORN && (word & HAS_RECORD)) {
        corrupt(&refusal, "feed.record", (int64_t)seq, seq, seq, record->seq);
        raise_refused((PyObject *)self, &refusal);
        return false;
    }
    return true;
}

/* record(seq) -> (birth, created_at_ms, started, completed_at_ms, elapsed_ms, id, head, outcome, rest,
 * detail), or None */
PyObject *
epoch_record(PyObject *object, PyObject *seq_object)
{
    Epoch *self = (Epoch *)object;
    uint64_t seq;
    Record record = {0};
    PyObject *data;
    if (!has_operations(self) || !as_u64(seq_object, &seq) || !take_retained(self, seq, &record, &data)) {
        return NULL;
    }
    if (data == NULL) {
        Py_RETURN_NONE;
    }
    const Lengths of = lengths_of(&record);
    const char *first = PyBytes_AsString(data), *second = first + padded(of.head + of.outcome);
    PyObject *found = Py_BuildValue(
        "(KKKKKy#y#y#y#y#)", (unsigned long long)record.birth,
        (unsigned long long)record.created_at_ms, (unsigned long long)record.started,
        (unsigned long long)record.completed_at_ms, (unsigned long long)record.elapsed_ms,
        (const char *)record.id, (Py_ssize_t)sizeof record.id, first, (Py_ssize_t)of.head,
        first + of.head, (Py_ssize_t)of.outcome, second, (Py_ssize_t)of.rest, second + of.rest,
        (Py_ssize_t)of.detail);
    Py_DECREF(data);
    return found;
}

static PyObject *
outcome_of(const Record *record, PyObject *data)
{
    const Lengths of = lengths_of(record);
    PyObject *outcome =
        PyBytes_FromStringAndSize(PyBytes_AsString(data) + of.head, (Py_ssize_t)of.outcome);
    Py_DECREF(data);
    return outcome;
}

/* The outcome of the operation that a slot holds or is kept for, in `outcome`: NULL if it has not
 * ended. False if the slot holds another operation now, or with an error set. */
static bool
take_from_slot(Epoch *self, uint64_t index, uint64_t birth, PyObject **outcome)
{
    const Slot *slot = slot_at(self, index);
    Record record = {0};
    CopiedSlot copy;
    PyObject *data;
    *outcome = NULL;
    for (int pass = 0; pass < PASSES; pass++) {
        if (!copy_slot(self, index, &copy)) {
            return false;
        }
        if (copy.birth != birth || status_of(copy.word) == STATUS_ABSENT) {
            return false;
        }
        if (copy.terminal_seq == 0) {
            return true;
        }
        if (!take_retained(self, copy.terminal_seq, &record, &data)) {
            return false;
        }
        if (data == NULL) { /* the feed has dropped it */
            const RecordState state =
                take_record(self, copy.position, copy.terminal_seq, &record, &data);
            if (state == RECORD_ERROR) {
                return false;
            }
            atomic_thread_fence(memory_order_acquire);
            if (load(&fingerprints_of(self)[index]) == FREE) {
                Py_CLEAR(data);
                return false;
            }
        }
        if (load(&slot->word) == copy.word) {
            *outcome = data == NULL ? NULL : outcome_of(&record, data);
            return *outcome != NULL;
        }
        Py_CLEAR(data);
    }
    return false;
}

/* The outcome of the registration `birth`, if it is in the feed above `since`; NULL without an
 * error set if it is not. */
static PyObject *
take_from_feed(Epoch *self, uint64_t birth, uint64_t since)
{
    const Control *control = control_of(self);
    const uint64_t watermark = load_published(&control->feed.watermark);
    const uint64_t room = self->shape.index_count;
    uint64_t seq = larger(since, load_published(&control->writer.dropped_through)) + 1;
    if (watermark > LAST_SEQ || seq > watermark) {
        return NULL;
    }
    seq = watermark - seq < room ? seq : watermark - room + 1;
    for (; seq <= watermark; seq++) {
        const uint64_t word = load_published(index_word(self, seq));
        Record record = {0};
        PyObject *data;
        if (!(word & HAS_RECORD) || !load_record(self, position_in(word), seq, &record)
            || record.birth != birth) {
            continue;
        }
        if (!take_retained(self, seq, &record, &data)) {
            return NULL;
        }
        return data == NULL ? NULL : outcome_of(&record, data);
    }
    return NULL;
}

/* outcome(slot, birth, since) -> the outcome of the operation that was registered as `birth` in a
 * slot, or None while it has not ended
 *
 * `since` is a watermark at which it had not ended. Refused as dropped if it has ended and its
 * record is gone. */
PyObject *
epoch_outcome(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Epoch *self = (Epoch *)object;
    uint64_t index, birth, since;
    PyObject *outcome;
    Refusal refusal;
    if (!check_arity("outcome", nargs, 3) || !parse_index(self, args[0], &index)
        || !as_u64(args[1], &birth) || !as_u64(args[2], &since)) {
        return NULL;
    }
    if (take_from_slot(self, index, birth, &outcome)) {
        return outcome != NULL ? outcome : Py_NewRef(Py_None);
    }
    if (!PyErr_Occurred()) {
        outcome = take_from_feed(self, birth, since);
    }
    if (outcome == NULL && !PyErr_Occurred()) {
        refuse(&refusal, "dropped", -1, 0);
        raise_refused(object, &refusal);
    }
    return outcome;
}
