/* Transitions that end operations, and the records that they write. */

#include "transition.h"

typedef struct {
    Subjects all;
    uint64_t now_ms, now_ns;
    bool waits_for_store;
    bool bare;              /* the records leave out the details, to fit the feed */
    unsigned char *scratch; /* room for one record */
    uint64_t first;         /* the sequence of the first */
    /* For `terminate` only. */
    bool seal;
    const uint64_t *participants; /* whose operations end, or NULL for all */
    uint64_t participant_count;
    const uint64_t *dead; /* whose watchers are forgotten */
    uint64_t dead_count;
} Ending;

static Lengths
ending_lengths(const Ending *ending, const Subject *subject)
{
    const Slot *slot = slot_at(ending->all.base.self, subject->slot);
    const uint64_t spec = load(&slot->spec_lengths), buffer = buffer_of(load(&slot->word));
    return (Lengths){
        .head = head_length(spec),
        .outcome = subject->length,
        .rest = rest_length(spec),
        .detail = ending->bare ? 0 : load(&slot->detail_length[buffer]),
    };
}

/* The bytes that all of their records take. */
static uint64_t
endings_size(const Ending *ending)
{
    uint64_t size = 0;
    for (uint64_t i = 0; i < ending->all.count; i++) {
        size += record_size(ending_lengths(ending, &ending->all.subjects[i]));
    }
    return size;
}

/* The record of one ending in `scratch`; its size. */
static uint64_t
compose(const Ending *ending, const Subject *subject, uint64_t seq)
{
    const Slot *slot = slot_at(ending->all.base.self, subject->slot);
    const Lengths lengths = ending_lengths(ending, subject);
    const uint64_t created_ns = load(&slot->created_mono_ns), started = load(&slot->started);
    const uint64_t created_ms = load(&slot->created_at_ms);
    const uint64_t elapsed_ns = ending->now_ns > created_ns ? ending->now_ns - created_ns : 0;
    const Record record = {
        .seq = seq,
        .birth = load(&slot->birth),
        .id = {load(&slot->id[0]), load(&slot->id[1])},
        .created_at_ms = created_ms,
        .started = started,
        .completed_at_ms =
            larger(ending->now_ms, larger(started != 0 ? started - 1 : 0, created_ms)),
        .elapsed_ms = elapsed_ns / 1000000,
        .lengths = pack_lengths(lengths),
    };
    unsigned char spec[SPEC_LIMIT], detail[DETAIL_LIMIT];
    copy_out(slot->spec, spec, lengths.head + lengths.rest);
    copy_out(slot->details[buffer_of(load(&slot->word))], detail, lengths.detail);
    const Parts parts = {spec, subject->outcome, spec + lengths.head, detail};
    return compose_record(record, &parts, ending->scratch);
}

/* The sequence that a store must have before a commit that ends at `last` and drops through
 * `dropped`.
 *
 * DURABLE-2: an entry is dropped only after a store has it, and the feed is ahead of the store by
 * no more sequences than a recovery skips. So no sequence is used again after a reboot. */
static uint64_t
awaited(const Words *words, uint64_t last, uint64_t dropped)
{
    uint64_t ahead = last > RECOVERY_SKIP ? last - RECOVERY_SKIP : 0;
    ahead = ahead < words->watermark ? ahead : words->watermark;
    return larger(ahead, dropped > words->dropped ? dropped : 0);
}

/* Ends all of the subjects by one store of the watermark. */
static bool
end_together(Ending *ending)
{
    Transition *one = &ending->all.base;
    Epoch *self = one->self;
    Control *control = control_of(self);
    const Words *words = &one->words;
    const uint64_t count = ending->all.count, last = words->watermark + count;
    Space space;
    bool watched = false;
    if (count == 0) {
        return true;
    }
    ending->bare = endings_size(ending) > self->room.feed_bytes; /* FEED-3 */
    for (uint64_t i = 0; i < count; i++) {
        watched = watched || is_watched(self, slot_at(self, ending->all.subjects[i].slot));
    }
    if (!find_room(self, words, count, endings_size(ending), &space, &one->refusal)) {
        return false;
    }
    const uint64_t wanted = awaited(words, last, space.dropped);
    if (ending->waits_for_store && wanted > load(&control->writer.durable_seq)) {
        return refuse(&one->refusal, "store_behind", -1, wanted);
    }
    if (space.dropped > words->dropped) {
        publish(&control->writer.dropped_through, space.dropped);
    }
    give_up_kept(self, words, &space);
    publish(&control->writer.intent, 1);
    if (watched) {
        publish(&control->writer.kept, 1);
    }
    atomic_thread_fence(memory_order_release); /* raised before it overwrites */
    uint64_t position = space.position;
    for (uint64_t i = 0; i < count; i++) {
        const Subject *subject = &ending->all.subjects[i];
        Slot *slot = slot_at(self, subject->slot);
        const uint64_t seq = words->watermark + 1 + i, length = compose(ending, subject, seq);
        ring_copy_in(self, position, ending->scratch, length);
        publish(index_word(self, seq), position | HAS_RECORD);
        publish(retained_word(self, words, seq), load(&fingerprints_of(self)[subject->slot]));
        publish(&slot->position, position);
        publish(&slot->terminal_seq, seq);
        position += length;
    }
    commit(self, &control->feed.watermark, last);
    publish(&control->writer.head, position);
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t slot = ending->all.subjects[i].slot;
        if (!is_watched(self, slot_at(self, slot))) {
            free_slot(self, slot);
        }
    }
    publish(&control->writer.intent, 0);
    return true;
}

static void
end_body(void *argument)
{
    Ending *ending = argument;
    if (begin(&ending->all.base) && find_subjects(&ending->all)) {
        ending->first = ending->all.base.words.watermark + 1;
        end_together(ending);
    }
}

/* Room for the largest record of an outcome of this length. */
static bool
allocate_scratch(Ending *ending, uint64_t longest)
{
    const Lengths most = {SPEC_LIMIT, longest, SPEC_LIMIT, DETAIL_LIMIT};
    ending->scratch = allocate(record_size(most), 1);
    return ending->scratch != NULL;
}

static void
free_ending(Ending *ending)
{
    free_subjects(&ending->all);
    PyMem_Free(ending->scratch);
}

/* end(((id, outcome), ...), statuses, now_ms, now_ns, waits_for_store) -> the sequence of the first
 *
 * Ends operations whose status is in the bits of `statuses`: all of them in one commit, or none. */
PyObject *
epoch_end(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Ending ending = {.all.base.self = (Epoch *)object};
    Subjects *all = &ending.all;
    if (!check_arity("end", nargs, 5) || !check_tuple(args[0], "ids and outcomes")
        || !as_u64(args[1], &all->statuses) || !as_count(args[2], &ending.now_ms)
        || !as_count(args[3], &ending.now_ns)) {
        return NULL;
    }
    const int waits = PyObject_IsTrue(args[4]);
    ending.waits_for_store = waits > 0;
    uint64_t longest = 0;
    bool made = waits >= 0 && allocate_subjects(all, (uint64_t)PyTuple_Size(args[0]));
    for (uint64_t i = 0; made && i < all->count; i++) {
        PyObject *each = PyTuple_GetItem(args[0], (Py_ssize_t)i);
        Subject *subject = &all->subjects[i];
        made = check_tuple(each, "an id and an outcome") && PyTuple_Size(each) == 2
               && parse_key(all->base.self, PyTuple_GetItem(each, 0), &subject->key)
               && parse_bytes(PyTuple_GetItem(each, 1), OUTCOME_LIMIT, &subject->outcome,
                              &subject->length);
        if (!made && !PyErr_Occurred()) {
            PyErr_SetString(PyExc_TypeError, "a tuple of an id and an outcome");
        }
        longest = larger(longest, subject->length);
    }
    made = made && allocate_scratch(&ending, longest) && run_on_operations(&all->base, true, end_body);
    free_ending(&ending);
    return made ? from_u64(ending.first) : NULL;
}

static bool
is_among(const uint64_t *keys, uint64_t count, uint64_t key)
{
    for (uint64_t i = 0; i < count; i++) {
        if (keys[i] == key) {
            return true;
        }
    }
    return false;
}

/* In the order of their registration. An insertion sort, since they mostly are in order already. */
static void
find_live(Ending *ending)
{
    Transition *one = &ending->all.base;
    const Epoch *self = one->self;
    Subject *subjects = ending->all.subjects;
    const Subject outcome = subjects[0]; /* the same for all */
    uint64_t count = 0;
    for (uint64_t index = 0; index < self->room.max_operations; index++) {
        const Slot *slot = slot_at(self, index);
        const uint64_t birth = load(&slot->birth);
        if (load(&fingerprints_of(self)[index]) == FREE || !is_active(slot, &one->words)
            || (ending->participants != NULL
                && !is_among(ending->participants, ending->participant_count,
                             load(&slot->participant)))) {
            continue;
        }
        uint64_t at = count++;
        for (; at > 0 && load(&slot_at(self, subjects[at - 1].slot)->birth) > birth; at--) {
            subjects[at].slot = subjects[at - 1].slot;
        }
        subjects[at].slot = index;
    }
    for (uint64_t i = 0; i < count; i++) {
        subjects[i].outcome = outcome.outcome;
        subjects[i].length = outcome.length;
    }
    ending->all.count = count;
}

static void
forget_watchers(Epoch *self, const Words *words, uint64_t participant)
{
    const uint64_t shift = watcher_shift(participant);
    publish(&control_of(self)->writer.intent, 1);
    for (uint64_t index = 0; index < self->room.max_operations; index++) {
        Slot *slot = slot_at(self, index);
        word_t *word = watcher_word(slot, participant);
        const uint64_t counts = load(word);
        if (load(&fingerprints_of(self)[index]) == FREE || (counts >> shift & UINT16_MAX) == 0) {
            continue;
        }
        publish(word, counts & ~((uint64_t)UINT16_MAX << shift));
        if (has_ended(slot, words) && !is_watched(self, slot)) {
            free_slot(self, index);
        }
    }
    publish(&control_of(self)->writer.intent, 0);
}

static void
terminate_body(void *argument)
{
    Ending *ending = argument;
    Transition *one = &ending->all.base;
    if (!begin(one)) {
        return;
    }
    for (uint64_t index = 0; index < one->self->room.max_operations; index++) {
        if (load(&fingerprints_of(one->self)[index]) != FREE
            && !check_slot(one->self, index, &one->refusal)) {
            return;
        }
    }
    find_live(ending);
    if (!end_together(ending)) {
        return;
    }
    one->words.watermark += ending->all.count;
    for (uint64_t i = 0; i < ending->dead_count; i++) {
        forget_watchers(one->self, &one->words, ending->dead[i]);
    }
    if (ending->seal) {
        seal(one);
    }
}

/* The keys of participants in a tuple, to be freed; NULL with an error set. */
static uint64_t *
parse_participants(const Epoch *self, PyObject *tuple, uint64_t *count)
{
    if (!check_tuple(tuple, "participants")) {
        return NULL;
    }
    *count = (uint64_t)PyTuple_Size(tuple);
    uint64_t *keys = allocate(*count, sizeof *keys);
    for (uint64_t i = 0; keys != NULL && i < *count; i++) {
        if (as_u64(PyTuple_GetItem(tuple, (Py_ssize_t)i), &keys[i])
            && lane_of(keys[i]) < self->room.max_participants) {
            continue;
        }
        if (!PyErr_Occurred()) {
            PyErr_Format(PyExc_ValueError, "no participant %llu", (unsigned long long)keys[i]);
        }
        PyMem_Free(keys);
        return NULL;
    }
    return keys;
}

/* terminate(outcome, participants, dead, now_ms, now_ns, waits_for_store, seal, wait) -> how many
 *
 * Ends in one commit the operations of these participants that have not ended, or of all with None, in
 * the order of their registration. Removes the watchers of the dead, and seals the epoch if `seal`
 * is true, before the lock is released. Refused as busy if the lock is held and `wait` is false. */
PyObject *
epoch_terminate(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Ending ending = {.all.base.self = (Epoch *)object};
    Epoch *self = ending.all.base.self;
    Subject outcome = {.length = 0};
    uint64_t *participants = NULL, *dead = NULL;
    if (!check_arity("terminate", nargs, 8)
        || !parse_bytes(args[0], OUTCOME_LIMIT, &outcome.outcome, &outcome.length)
        || !as_count(args[3], &ending.now_ms) || !as_count(args[4], &ending.now_ns)) {
        return NULL;
    }
    const int waits = PyObject_IsTrue(args[5]), seals = PyObject_IsTrue(args[6]),
              wait = PyObject_IsTrue(args[7]);
    bool made = waits >= 0 && seals >= 0 && wait >= 0;
    ending.waits_for_store = waits > 0;
    ending.seal = seals > 0;
    if (made && args[1] != Py_None) {
        participants = parse_participants(self, args[1], &ending.participant_count);
        made = participants != NULL;
    }
    if (made) {
        dead = parse_participants(self, args[2], &ending.dead_count);
        made = dead != NULL && allocate_subjects(&ending.all, self->room.max_operations)
               && allocate_scratch(&ending, outcome.length);
    }
    if (made) {
        ending.participants = participants;
        ending.dead = dead;
        ending.all.subjects[0] = outcome;
        made = run_on_operations(&ending.all.base, wait > 0, terminate_body);
    }
    free_ending(&ending);
    PyMem_Free(participants);
    PyMem_Free(dead);
    return made ? from_u64(ending.all.count) : NULL;
}
