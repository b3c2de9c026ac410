/* The operations that a segment holds: the words that commit, the search for an operation, and the
 * repair after a killed writer.
 *
 * OPS-2: a slot holds an operation if its birth is at most `registrations`. The operation has ended if
 * and only if `0 < terminal_seq <= watermark`.
 * OPS-3: an operation that has ended is retained while it is among the newest `max_completed`, was
 * not collected, and its record, which has its outcome, is in the feed.
 * OPS-6: while an operation that has ended is watched, another does not get its slot, and its record
 * is not overwritten after the feed has dropped it. Registrations and new records have priority: if
 * there is no other slot or room, they take those of the oldest such operation.
 */

#include "epoch.h"

bool
load_words(const Epoch *self, Words *words, Refusal *refusal)
{
    const Control *control = control_of(self);
    words->registrations = load_published(&control->writer.registrations);
    words->watermark = load_published(&control->feed.watermark);
    words->origin = load(&control->header.origin);
    words->skipped_after = load(&control->header.skipped_after);
    words->skipped_through = load(&control->header.skipped_through);
    words->dropped = load_published(&control->writer.dropped_through);
    words->collected = load_published(&control->writer.collected_through);
    const uint64_t watermark = words->watermark;
    if (watermark > LAST_SEQ) {
        return corrupt(refusal, "watermark", -1, 0, LAST_SEQ, watermark);
    }
    if (words->skipped_through > watermark || words->skipped_after > words->skipped_through) {
        return corrupt(refusal, "skipped_through", -1, words->skipped_after, watermark,
                       words->skipped_through);
    }
    if (words->origin > watermark) {
        return corrupt(refusal, "origin", -1, 0, watermark, words->origin);
    }
    words->active = words->registrations - (watermark - words->origin);
    const uint64_t most = self->room.max_completed;
    uint64_t newest = watermark > most ? watermark - most : 0;
    if (newest < words->skipped_through) { /* skipped sequences have no operation to retain */
        const uint64_t skipped = words->skipped_through - words->skipped_after;
        newest = watermark > most + skipped ? watermark - most - skipped : 0;
    }
    words->floor = larger(newest, larger(words->collected, words->dropped));
    return true;
}

bool
check_words(const Epoch *self, const Words *words, Refusal *refusal)
{
    const uint64_t watermark = words->watermark, most = self->room.max_operations;
    const uint64_t capacity = self->shape.index_count;
    const uint64_t lowest = watermark > capacity ? watermark - capacity : 0;
    if (words->dropped < lowest || words->dropped > watermark) {
        return corrupt(refusal, "dropped_through", -1, lowest, watermark, words->dropped);
    }
    if (words->collected > watermark) {
        return corrupt(refusal, "collected_through", -1, 0, watermark, words->collected);
    }
    if (words->active > most) {
        return corrupt(refusal, "registrations less completions", -1, 0, most, words->active);
    }
    return true;
}

/* --- how an operation is found ------------------------------------------------------------------ */

bool
parse_key(const Epoch *self, PyObject *object, Key *key)
{
    ModuleState *state = PyType_GetModuleState(Py_TYPE((PyObject *)self));
    if (!PyObject_TypeCheck(object, state->identifier_type)) {
        PyErr_Format(PyExc_TypeError, "an operation is named by its id, not by %R", object);
        return false;
    }
    const char *raw = PyBytes_AsString(((Identifier *)object)->raw);
    memcpy(key->id, raw, sizeof key->id);
    /* The random half of a UUID v7; zero means that there is no id. */
    key->fingerprint = key->id[1] != 0 ? key->id[1] : 1;
    return true;
}

static bool
has_key(const Slot *slot, const Key *key)
{
    return load(&slot->id[0]) == key->id[0] && load(&slot->id[1]) == key->id[1];
}

/* Whether a slot holds an operation that has not ended. */
static bool
is_live(const Slot *slot, const Words *words)
{
    return status_of(load(&slot->word)) != STATUS_ABSENT && is_active(slot, words);
}

/* Whether a sequence's record is of the operation of this key. */
static bool
records(const Epoch *self, uint64_t seq, const Key *key)
{
    const uint64_t word = load(index_word(self, seq)), position = position_in(word);
    Record record;
    return (word & HAS_RECORD) && load_record(self, position, seq, &record)
           && record.id[0] == key->id[0] && record.id[1] == key->id[1];
}

typedef enum { SLOT_OTHER, SLOT_FOUND, SLOT_DAMAGED } SlotState;

/* Whether a slot with the key's fingerprint holds the operation of the key. */
static SlotState
check_match(Epoch *self, const Words *words, const Key *key, Py_ssize_t index, Refusal *refusal)
{
    const Slot *slot = slot_at(self, (uint64_t)index);
    if (!has_key(slot, key)) {
        return SLOT_OTHER;
    }
    if (!check_slot(self, (uint64_t)index, refusal)) {
        return SLOT_DAMAGED;
    }
    return is_live(slot, words) ? SLOT_FOUND : SLOT_OTHER;
}

/* The slot of an operation that has not ended, or -1. */
static SlotState
find_slot(Epoch *self, const Words *words, const Key *key, int64_t *found, Refusal *refusal)
{
    const word_t *fingerprints = fingerprints_of(self);
    const Py_ssize_t slots = (Py_ssize_t)self->room.max_operations;
    _Atomic uint32_t *hint = &self->hints[key->fingerprint % HINTS];
    const Py_ssize_t hinted = atomic_load_explicit(hint, memory_order_relaxed);
    SlotState state = SLOT_OTHER;
    *found = -1;
    if (hinted < slots && load(&fingerprints[hinted]) == key->fingerprint) {
        state = check_match(self, words, key, hinted, refusal);
        *found = hinted;
    }
    Py_ssize_t index = -1;
    while (state == SLOT_OTHER
           && (index = find_word(fingerprints, slots, WORD, key->fingerprint, index + 1)) >= 0) {
        state = check_match(self, words, key, index, refusal);
        *found = index;
    }
    if (state == SLOT_FOUND) {
        atomic_store_explicit(hint, (uint32_t)*found, memory_order_relaxed);
    }
    else {
        *found = -1;
    }
    return state;
}

bool
find_operation(Epoch *self, const Words *words, const Key *key, Place *place, Refusal *refusal)
{
    *place = (Place){.slot = -1};
    const SlotState state = find_slot(self, words, key, &place->slot, refusal);
    if (state != SLOT_OTHER) {
        return state == SLOT_FOUND;
    }
    for (uint64_t seq = words->watermark; seq > words->floor; seq--) {
        if (seq == words->skipped_through && words->skipped_after < seq) {
            seq = words->skipped_after + 1; /* these have no operation */
            continue;
        }
        if (load(retained_word(self, words, seq)) == key->fingerprint && records(self, seq, key)) {
            place->seq = seq;
            return true;
        }
    }
    return true;
}

/* --- one slot ------------------------------------------------------------------------------------ */

bool
check_slot(const Epoch *self, uint64_t index, Refusal *refusal)
{
    const Slot *slot = slot_at(self, index);
    const struct {
        const char *field;
        uint64_t most, actual;
    } words[] = {
        {"slot.word's spare bits", 0, load(&slot->word) & SPARE_BITS},
        {"slot.birth", LAST_COUNT, load(&slot->birth)},
        {"slot.terminal_seq", LAST_SEQ, load(&slot->terminal_seq)},
        {"slot.participant's slot", self->room.max_participants - 1, lane_of(load(&slot->participant))},
        {"slot.created_at_ms", LAST_COUNT, load(&slot->created_at_ms)},
        {"slot.created_mono_ns", LAST_COUNT, load(&slot->created_mono_ns)},
        {"slot.started", LAST_COUNT + 1, load(&slot->started)},
        {"slot.spec_length", SPEC_LIMIT,
         head_length(load(&slot->spec_lengths)) + rest_length(load(&slot->spec_lengths))},
        {"slot.detail_length[0]", DETAIL_LIMIT, load(&slot->detail_length[0])},
        {"slot.detail_length[1]", DETAIL_LIMIT, load(&slot->detail_length[1])},
    };
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        if (words[i].actual > words[i].most) {
            return corrupt(refusal, words[i].field, (int64_t)index, 0, words[i].most,
                           words[i].actual);
        }
    }
    return true;
}

bool
is_watched(const Epoch *self, const Slot *slot)
{
    for (uint64_t word = 0; word < watcher_words(self); word++) {
        if (load(&slot->watchers[word]) != 0) {
            return true;
        }
    }
    return false;
}

void
free_slot(const Epoch *self, uint64_t index)
{
    publish(&fingerprints_of(self)[index], FREE);
}

int64_t
take_free_slot(const Epoch *self, const Words *words)
{
    const word_t *fingerprints = fingerprints_of(self);
    const Py_ssize_t slots = (Py_ssize_t)self->room.max_operations;
    int64_t found = find_word(fingerprints, slots, WORD, FREE, 0);
    uint64_t oldest = UINT64_MAX;
    /* The table has a slot for each operation that is admitted, so if it is full, slots keep
     * outcomes. */
    for (Py_ssize_t index = 0; found < 0 && index < slots; index++) {
        const Slot *slot = slot_at(self, (uint64_t)index);
        const uint64_t seq = load(&slot->terminal_seq);
        if (has_ended(slot, words) && seq < oldest) {
            oldest = seq;
        }
    }
    for (Py_ssize_t index = 0; found < 0 && oldest != UINT64_MAX && index < slots; index++) {
        if (load(&slot_at(self, (uint64_t)index)->terminal_seq) == oldest) {
            free_slot(self, (uint64_t)index);
            found = index;
        }
    }
    return found;
}

bool
repair(const Epoch *self, const Words *words, Refusal *refusal)
{
    for (uint64_t index = 0; index < self->room.max_operations; index++) {
        Slot *slot = slot_at(self, index);
        if (!check_slot(self, index, refusal)) {
            return false;
        }
        if (load(&slot->birth) > words->registrations) {
            free_slot(self, index);
            publish(&slot->birth, 0);
        }
        else if (load(&slot->terminal_seq) > words->watermark) {
            publish(&slot->terminal_seq, 0);
        }
        else if (has_ended(slot, words) && !is_watched(self, slot)) {
            free_slot(self, index);
        }
    }
    Control *control = control_of(self);
    const uint64_t word = load(index_word(self, words->watermark));
    const uint64_t position = position_in(word);
    Record last;
    /* A writer was killed after its commit and before it moved the head; its last record is
     * whole. */
    if ((word & HAS_RECORD) && load(&control->writer.head) <= position) {
        if (position > LAST_POSITION || !load_record(self, position, words->watermark, &last)) {
            return corrupt(refusal, "feed.position", (int64_t)words->watermark, 0, LAST_POSITION,
                           position);
        }
        publish(&control->writer.head, position + record_size(lengths_of(&last)));
    }
    /* Relaxed: monitors read the number, and nothing is published by it. Before the intent is cleared: a
     * repair that is broken off in between is counted twice, and none is missed. */
    atomic_store_explicit(&control->writer.repairs, load(&control->writer.repairs) + 1,
                          memory_order_relaxed);
    publish(&control->writer.intent, 0);
    return true;
}
