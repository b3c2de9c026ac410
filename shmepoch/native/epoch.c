/* Epoch: each transition of a segment's operations, once.
 *
 * A transition is one call that takes the writer lock itself. Under the lock it begins (the epoch is
 * open, and what was broken off is repaired), validates, prepares what no reader counts yet, commits
 * by one store, and tidies. It is refused with a reason and facts; a refused one changes nothing.
 *
 * OPS-4: a transition becomes true by exactly one atomic store: of the watermark for those that end
 * operations, of `registrations` for a registration, of the slot's word or the watcher's count for the
 * rest. The first two prepare several words; an intent word says so. The next writer that finds it
 * undoes what was not committed.
 */

#include "epoch.h"

#include <sys/mman.h>

/* Far above what any feed takes, and what a record's lengths can hold. */
#define OUTCOME_LIMIT (UINT32_MAX / 2)

/* What every body begins with: the epoch, and why it was refused. */
typedef struct {
    Epoch *self;
    Words words;
    Refusal refusal;
} Transition;

/* The slot of a participant, by its key. */
static uint64_t
lane_of(uint64_t participant)
{
    return participant & 0xff;
}

/* THE one store that makes a transition true. Release: it publishes all that was prepared. */
static void
commit(Epoch *self, word_t *word, uint64_t value)
{
#ifdef SHMEPOCH_AUDIT
    atomic_fetch_add_explicit(&self->commits, 1, memory_order_relaxed);
#else
    (void)self;
#endif
    publish(word, value);
}

/* Loads the words of the epoch, after it has repaired what was broken off. */
static bool
mend(Transition *one)
{
    Epoch *self = one->self;
    if (!load_words(self, &one->words, &one->refusal)
        || !check_words(self, &one->words, &one->refusal)) {
        return false;
    }
    return load(&control_of(self)->writer.intent) == 0 || repair(self, &one->words, &one->refusal);
}

static bool
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

/* Runs a transition's body under the writer lock; false with an error set, if it was not made. */
static bool
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

/* The same, for what is about operations. */
static bool
run_on_operations(Transition *one, bool wait, void (*body)(void *))
{
    return has_operations(one->self) && run(one, wait, body);
}

static bool
check_tuple(PyObject *object, const char *of)
{
    if (!PyTuple_Check(object)) {
        PyErr_Format(PyExc_TypeError, "a tuple of %s, not %R", of, object);
        return false;
    }
    return true;
}

static bool
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

/* Memory for `count` of a transition's operations, zeroed; at least one, so that NULL is a failure. */
static void *
allocate(uint64_t count, size_t size)
{
    void *made = PyMem_Calloc(count > 0 ? (size_t)count : 1, size);
    if (made == NULL) {
        PyErr_NoMemory();
    }
    return made;
}

/* --- registration -------------------------------------------------------------------------------- */

typedef struct {
    Key key;
    const unsigned char *head, *rest;
    uint64_t head_length, rest_length;
} Entrant;

typedef struct {
    Transition base;
    Entrant *entrants;
    uint64_t count, created_at_ms, created_mono_ns, first;
} Registration;

static void
fill_slot(const Epoch *self, uint64_t index, const Registration *all, const Entrant *entrant,
          uint64_t birth)
{
    Slot *slot = slot_at(self, index);
    const uint64_t passing = next_word(load(&slot->word), STATUS_ABSENT, 0);
    publish(&slot->word, passing); /* readers of what was here before see that it is going */
    atomic_thread_fence(memory_order_release);
    const struct {
        word_t *word;
        uint64_t value;
    } fields[] = {
        {&slot->birth, birth},
        {&slot->terminal_seq, 0},
        {&slot->id[0], entrant->key.id[0]},
        {&slot->id[1], entrant->key.id[1]},
        {&slot->participant, writer_participant(self->lock)},
        {&slot->created_at_ms, all->created_at_ms},
        {&slot->created_mono_ns, all->created_mono_ns},
        {&slot->started, 0},
        {&slot->position, 0},
        {&slot->spec_lengths, entrant->rest_length << 32 | entrant->head_length},
        {&slot->detail_length[0], 0},
        {&slot->detail_length[1], 0},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        atomic_store_explicit(fields[i].word, fields[i].value, memory_order_relaxed);
    }
    for (uint64_t word = 0; word < padded(2 * self->room.max_participants) / WORD; word++) {
        atomic_store_explicit(&slot->watchers[word], 0, memory_order_relaxed);
    }
    unsigned char spec[SPEC_LIMIT];
    memcpy(spec, entrant->head, entrant->head_length);
    memcpy(spec + entrant->head_length, entrant->rest, entrant->rest_length);
    copy_in(slot->spec, spec, entrant->head_length + entrant->rest_length);
    publish(&fingerprints_of(self)[index], entrant->key.fingerprint);
    publish(&slot->word, next_word(passing, STATUS_PROVISIONING, 0));
}

/* Whether an entrant is one of those before it; for those that are not entered any more. */
static bool
is_repeated(const Registration *all, uint64_t index)
{
    for (uint64_t i = 0; i < index; i++) {
        if (memcmp(&all->entrants[i].key, &all->entrants[index].key, sizeof(Key)) == 0) {
            return true;
        }
    }
    return false;
}

static void
register_body(void *argument)
{
    Registration *all = argument;
    Transition *one = &all->base;
    Epoch *self = one->self;
    if (!begin(one)) {
        return;
    }
    Control *control = control_of(self);
    const uint64_t most = self->room.max_operations, active = one->words.active;
    const uint64_t limit = self->max_concurrent != 0 ? self->max_concurrent : most;
    Words words = one->words; /* with those that are prepared */
    all->first = words.registrations + 1;
    publish(&control->writer.intent, 1);
    for (uint64_t i = 0; i < all->count; i++) {
        const Entrant *entrant = &all->entrants[i];
        Place place;
        if (!find_operation(self, &words, &entrant->key, &place, &one->refusal)) {
            break;
        }
        const bool full = active + i >= limit || active + i >= most;
        if (place.slot >= 0 || place.seq != 0 || (full && is_repeated(all, i))) {
            refuse(&one->refusal, "already_registered", (int64_t)i, 0);
            break;
        }
        if (full) {
            refuse(&one->refusal, "limit", (int64_t)i, active);
            continue; /* one of the others may be registered already, which is said first */
        }
        const int64_t slot = take_free_slot(self, &one->words);
        if (slot < 0) {
            corrupt(&one->refusal, "free slots", -1, 1, most, 0);
            break;
        }
        fill_slot(self, (uint64_t)slot, all, entrant, ++words.registrations);
        atomic_store_explicit(&self->hints[entrant->key.fingerprint % HINTS], (uint32_t)slot,
                              memory_order_relaxed);
    }
    if (one->refusal.reason == NULL) {
        commit(self, &control->writer.registrations, words.registrations);
        publish(&control->writer.intent, 0);
    }
    else if (words.registrations == one->words.registrations) {
        publish(&control->writer.intent, 0);
    }
    else {
        Refusal unsound;
        repair(self, &one->words, &unsound);
    }
}

/* register(((id, head, rest), ...), created_at_ms, created_mono_ns) -> the number of the first
 *
 * Enters operations, in provisioning: all of them in one commit, or none. */
static PyObject *
epoch_register(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Registration all = {.base.self = (Epoch *)object};
    if (!check_arity("register", nargs, 3) || !check_tuple(args[0], "ids and specs")
        || !as_count(args[1], &all.created_at_ms) || !as_count(args[2], &all.created_mono_ns)) {
        return NULL;
    }
    all.count = (uint64_t)PyTuple_Size(args[0]);
    all.entrants = allocate(all.count, sizeof *all.entrants);
    bool made = all.entrants != NULL;
    for (uint64_t i = 0; made && i < all.count; i++) {
        PyObject *each = PyTuple_GetItem(args[0], (Py_ssize_t)i);
        Entrant *entrant = &all.entrants[i];
        made = check_tuple(each, "an id, a head and a rest") && PyTuple_Size(each) == 3
               && parse_key(all.base.self, PyTuple_GetItem(each, 0), &entrant->key)
               && parse_bytes(PyTuple_GetItem(each, 1), SPEC_LIMIT, &entrant->head,
                              &entrant->head_length)
               && parse_bytes(PyTuple_GetItem(each, 2), SPEC_LIMIT - entrant->head_length,
                              &entrant->rest, &entrant->rest_length);
        if (!made && !PyErr_Occurred()) {
            PyErr_SetString(PyExc_TypeError, "a tuple of an id, a head and a rest");
        }
    }
    made = made && run_on_operations(&all.base, true, register_body);
    PyMem_Free(all.entrants);
    return made ? from_u64(all.first) : NULL;
}

/* --- transitions that do not end an operation ------------------------------------------------------ */

/* The slot of an operation whose status is one of a set of bits; -1 where it is refused. */
static int64_t
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

/* One of several operations that a transition is about. */
typedef struct {
    Key key;
    const unsigned char *outcome; /* what ends it */
    uint64_t length;
    uint64_t slot;
} Subject;

typedef struct {
    Transition base;
    Subject *subjects;
    uint64_t count, statuses;
    unsigned char *seen; /* for each slot, whether one of the subjects is in it */
} Subjects;

/* Finds all of them before any is changed; one that is there twice is refused as if the first time had
 * been done already. */
static bool
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

static bool
allocate_subjects(Subjects *all, uint64_t count)
{
    all->count = count;
    all->subjects = allocate(count, sizeof *all->subjects);
    all->seen = allocate(all->base.self->room.max_operations, 1);
    return all->subjects != NULL && all->seen != NULL;
}

static void
free_subjects(Subjects *all)
{
    PyMem_Free(all->subjects);
    PyMem_Free(all->seen);
}

typedef struct {
    Subjects all;
    uint64_t now_ms;
} Start;

static void
start_body(void *argument)
{
    Start *start = argument;
    Transition *one = &start->all.base;
    if (!begin(one) || !find_subjects(&start->all)) {
        return;
    }
    for (uint64_t i = 0; i < start->all.count; i++) {
        Slot *slot = slot_at(one->self, start->all.subjects[i].slot);
        const uint64_t word = load(&slot->word);
        publish(&slot->started, larger(start->now_ms, load(&slot->created_at_ms)) + 1);
        commit(one->self, &slot->word, next_word(word, STATUS_RUNNING, buffer_of(word)));
    }
}

/* start((id, ...), now_ms)
 *
 * They run from now on, and not from before their registration. They start one by one, if all of them
 * may. */
static PyObject *
epoch_start(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Start start = {.all.base.self = (Epoch *)object, .all.statuses = 1 << STATUS_PROVISIONING};
    if (!check_arity("start", nargs, 2) || !check_tuple(args[0], "ids")
        || !as_count(args[1], &start.now_ms)) {
        return NULL;
    }
    bool made = allocate_subjects(&start.all, (uint64_t)PyTuple_Size(args[0]));
    for (uint64_t i = 0; made && i < start.all.count; i++) {
        made = parse_key(start.all.base.self, PyTuple_GetItem(args[0], (Py_ssize_t)i),
                         &start.all.subjects[i].key);
    }
    made = made && run_on_operations(&start.all.base, true, start_body);
    free_subjects(&start.all);
    return made ? Py_NewRef(Py_None) : NULL;
}

typedef struct {
    Transition base;
    Key key;
    uint64_t statuses, target, expected, length;
    const unsigned char *detail; /* NULL: it stays */
} Change;

static void
change_body(void *argument)
{
    Change *change = argument;
    Transition *one = &change->base;
    const int64_t index = begin(one) ? find_allowed(one, &change->key, change->statuses, 0) : -1;
    if (index < 0) {
        return;
    }
    Slot *slot = slot_at(one->self, (uint64_t)index);
    const uint64_t word = load(&slot->word);
    const uint64_t status = change->target != 0 ? change->target : status_of(word);
    uint64_t buffer = buffer_of(word);
    if (change->detail != NULL) {
        if (word != change->expected) {
            refuse(&one->refusal, "changed", 0, word);
            return;
        }
        buffer ^= 1; /* the one that no reader looks at */
        atomic_thread_fence(memory_order_release);
        copy_in(slot->details[buffer], change->detail, change->length);
        publish(&slot->detail_length[buffer], change->length);
    }
    commit(one->self, &slot->word, next_word(word, status, buffer));
}

/* change(id, statuses, target, word, detail)
 *
 * Gives an operation whose status is one of a set of bits the status `target`, unless that is 0, and
 * `detail`, unless that is None. A detail was made of what `slot` said; where its word is not `word`
 * any more, it is refused. */
static PyObject *
epoch_change(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Change change = {.base.self = (Epoch *)object};
    if (!check_arity("change", nargs, 5) || !parse_key(change.base.self, args[0], &change.key)
        || !as_u64(args[1], &change.statuses) || !as_u64(args[2], &change.target)
        || !as_u64(args[3], &change.expected)
        || (args[4] != Py_None
            && !parse_bytes(args[4], DETAIL_LIMIT, &change.detail, &change.length))) {
        return NULL;
    }
    if (change.target > STATUS_MASK) {
        PyErr_SetString(PyExc_ValueError, "the status of an operation that has not ended");
        return NULL;
    }
    return run_on_operations(&change.base, true, change_body) ? Py_NewRef(Py_None) : NULL;
}

/* --- transitions that end operations --------------------------------------------------------------- */

typedef struct {
    Subjects all;
    uint64_t now_ms, now_ns;
    bool waits_for_store;
    bool bare;              /* their details are left out, since they do not fit with them */
    unsigned char *scratch; /* room for one record */
    uint64_t first;         /* the sequence of the first */
    /* What `terminate` does besides. */
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

/* What the records of all of them take. */
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
    unsigned char spec[SPEC_LIMIT], *at = ending->scratch;
    copy_out(slot->spec, spec, lengths.head + lengths.rest);
    memset(at, 0, record_size(lengths)); /* what pads the parts */
    memcpy(at, &record, sizeof record);
    at += sizeof record;
    memcpy(at, spec, lengths.head);
    memcpy(at + lengths.head, subject->outcome, lengths.outcome);
    at += padded(lengths.head + lengths.outcome);
    memcpy(at, spec + lengths.head, lengths.rest);
    copy_out(slot->details[buffer_of(load(&slot->word))], at + lengths.rest, lengths.detail);
    seal_record(ending->scratch);
    return record_size(lengths);
}

/* What a store has to have before a commit that ends at `last` and drops through `dropped`.
 *
 * DURABLE-2: nothing is dropped that no store has, and no more is committed beyond the store than a
 * recovery leaves out, so that no sequence comes again after a reboot. */
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
    uint64_t position, dropped;
    bool watched = false;
    if (count == 0) {
        return true;
    }
    ending->bare = endings_size(ending) > self->room.feed_bytes; /* FEED-3 */
    for (uint64_t i = 0; i < count; i++) {
        watched = watched || is_watched(self, slot_at(self, ending->all.subjects[i].slot));
    }
    if (!find_room(self, words, count, endings_size(ending), &position, &dropped, &one->refusal)) {
        return false;
    }
    if (ending->waits_for_store && awaited(words, last, dropped) > load(&control->writer.durable_seq)) {
        return refuse(&one->refusal, "store_behind", -1, awaited(words, last, dropped));
    }
    if (dropped > words->dropped) {
        publish(&control->writer.dropped_through, dropped);
    }
    publish(&control->writer.intent, 1);
    if (watched) {
        publish(&control->writer.kept, 1);
    }
    atomic_thread_fence(memory_order_release); /* what is dropped, before it is overwritten */
    for (uint64_t i = 0; i < count; i++) {
        const Subject *subject = &ending->all.subjects[i];
        Slot *slot = slot_at(self, subject->slot);
        const uint64_t seq = words->watermark + 1 + i, length = compose(ending, subject, seq);
        ring_copy_in(self, position, ending->scratch, length);
        publish(index_word(self, seq), position | RECORD_BIT);
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
 * Ends operations whose statuses are of a set of bits: all of them in one commit, or none. */
static PyObject *
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

/* In the order of their registration: an insertion for each, since they mostly are in order. */
static void
find_live(Ending *ending, uint64_t most)
{
    Transition *one = &ending->all.base;
    const Epoch *self = one->self;
    Subject *subjects = ending->all.subjects;
    const Subject outcome = subjects[0]; /* the same for all */
    uint64_t count = 0;
    for (uint64_t index = 0; index < most; index++) {
        const Slot *slot = slot_at(self, index);
        const uint64_t birth = load(&slot->birth);
        if (load(&fingerprints_of(self)[index]) == FREE || birth == 0
            || birth > one->words.registrations || has_ended(slot, &one->words)
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
    const uint64_t lane = lane_of(participant), shift = 16 * (lane % 4);
    publish(&control_of(self)->writer.intent, 1);
    for (uint64_t index = 0; index < self->room.max_operations; index++) {
        Slot *slot = slot_at(self, index);
        word_t *word = &slot->watchers[lane / 4];
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

static bool
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
    find_live(ending, one->self->room.max_operations);
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
 * the order of their registration. Forgets what the dead watched, and seals the epoch if that is asked
 * for, before the lock is released. Refused as busy if it is not to wait for the lock. */
static PyObject *
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

static void
seal_body(void *argument)
{
    seal(argument);
}

/* seal(): ends the epoch for good. It reads nothing else, so that a damaged one can be sealed. */
static PyObject *
epoch_seal(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    Transition one = {.self = (Epoch *)object};
    return run(&one, true, seal_body) ? Py_NewRef(Py_None) : NULL;
}

/* --- collecting, and watchers ---------------------------------------------------------------------- */

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

/* collect(collected, through): the terminal operations through a sequence are retained no longer;
 * refused if others were collected since `collected`. */
static PyObject *
epoch_collect(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Collection collection = {.base.self = (Epoch *)object};
    if (!check_arity("collect", nargs, 2) || !as_u64(args[0], &collection.collected)
        || !as_u64(args[1], &collection.through)) {
        return NULL;
    }
    return run_on_operations(&collection.base, true, collect_body) ? Py_NewRef(Py_None) : NULL;
}

/* One more or one less watcher of this process's, as a word of a slot. */
static uint64_t
counted(const Slot *slot, uint64_t participant, bool more)
{
    const uint64_t lane = lane_of(participant), shift = 16 * (lane % 4);
    const uint64_t counts = load(&slot->watchers[lane / 4]), count = counts >> shift & UINT16_MAX;
    if (more) {
        return count < UINT16_MAX ? counts + (UINT64_C(1) << shift) : counts;
    }
    return count > 0 ? counts - (UINT64_C(1) << shift) : counts;
}

static void
count_watcher(Epoch *self, uint64_t index, bool more)
{
    Slot *slot = slot_at(self, index);
    const uint64_t participant = writer_participant(self->lock);
    commit(self, &slot->watchers[lane_of(participant) / 4], counted(slot, participant, more));
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
static PyObject *
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
        publish(intent, 1); /* a slot may have to be given back, too */
    }
    for (uint64_t i = 0; i < all->count; i++) {
        const uint64_t index = all->watched[i].slot;
        const Slot *slot = slot_at(self, index);
        if (load(&slot->birth) != all->watched[i].birth
            || load(&fingerprints_of(self)[index]) == FREE) {
            continue; /* it has passed to another */
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
 * Counts one more watcher of those that have not ended, or one less of all; the last one of an ended
 * operation gives its slot back. Refused as busy where it would have to wait. */
static PyObject *
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
               && as_u64(PyTuple_GetItem(each, 0), &all.watched[i].slot)
               && as_u64(PyTuple_GetItem(each, 1), &all.watched[i].birth);
        if (made && all.watched[i].slot >= all.base.self->room.max_operations) {
            PyErr_Format(PyExc_IndexError, "no slot %llu: there are %llu",
                         (unsigned long long)all.watched[i].slot,
                         (unsigned long long)all.base.self->room.max_operations);
            made = false;
        }
        else if (!made && !PyErr_Occurred()) {
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

/* --- the whole of it --------------------------------------------------------------------------------- */

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

/* copy() -> private memory like this epoch's at one moment, with what was broken off repaired */
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

/* A record that is laid into a fresh epoch. */
typedef struct {
    Record record;
    Key key;
    const unsigned char *head, *outcome, *rest, *detail;
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
        || !parse_bytes(PyTuple_GetItem(each, 7), HEAD_LIMIT, &restored->head, &lengths.head)
        || !parse_bytes(PyTuple_GetItem(each, 8), room, &restored->outcome, &lengths.outcome)
        || !parse_bytes(PyTuple_GetItem(each, 9), SPEC_LIMIT, &restored->rest, &lengths.rest)
        || !parse_bytes(PyTuple_GetItem(each, 10), DETAIL_LIMIT, &restored->detail,
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

/* Fresh memory, into which a stored epoch is laid. */
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
    one->words.skipped_after = all->skipped_after; /* which places the fingerprints */
    one->words.skipped_through = all->last;
    publish(index_word(self, all->dropped), head);
    for (uint64_t i = 0; i < all->count; i++) {
        const Restored *each = &all->restored[i];
        const Record *record = &each->record;
        const Lengths of = lengths_of(record);
        unsigned char *first = all->scratch + sizeof *record;
        unsigned char *second = first + padded(of.head + of.outcome);
        for (; next < record->seq; next++) {
            publish(index_word(self, next), head);
        }
        memset(all->scratch, 0, record_size(of));
        memcpy(all->scratch, record, sizeof *record);
        memcpy(first, each->head, of.head);
        memcpy(first + of.head, each->outcome, of.outcome);
        memcpy(second, each->rest, of.rest);
        memcpy(second + of.rest, each->detail, of.detail);
        seal_record(all->scratch);
        ring_copy_in(self, head, all->scratch, record_size(of));
        publish(index_word(self, record->seq), head | RECORD_BIT);
        publish(retained_word(self, &one->words, record->seq),
                record->birth != 0 ? each->key.fingerprint : FREE);
        head += record_size(of);
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
 * Lays records into a fresh epoch that no other process has found, those after `dropped` and in order:
 * (seq, birth, created_at_ms, started, completed_at_ms, elapsed_ms, id, head, outcome, rest, detail).
 * Sequences through `last` without one will never have one; recovery skipped those above
 * `skipped_after`. */
static PyObject *
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

/* Nothing is cleared that is used: the lock clears what can be part of a cycle. */
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
