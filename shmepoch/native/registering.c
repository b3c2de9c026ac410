/* The registration of operations, in the status `provisioning`. */

#include "transition.h"

#include <stdlib.h>

typedef struct {
    Key key;
    const unsigned char *head, *rest;
    uint64_t head_length, rest_length;
} Entrant;

typedef struct {
    Transition base;
    Entrant *entrants;
    uint64_t count, repeated, created_at_ms, created_mono_ns, first;
} Registration;

static void
fill_slot(const Epoch *self, uint64_t index, const Registration *all, const Entrant *entrant,
          uint64_t birth)
{
    Slot *slot = slot_at(self, index);
    const uint64_t passing = next_word(load(&slot->word), STATUS_ABSENT, 0);
    publish(&slot->word, passing); /* readers of the last operation see its end */
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
    for (uint64_t word = 0; word < watcher_words(self); word++) {
        atomic_store_explicit(&slot->watchers[word], 0, memory_order_relaxed);
    }
    unsigned char spec[SPEC_LIMIT];
    memcpy(spec, entrant->head, entrant->head_length);
    memcpy(spec + entrant->head_length, entrant->rest, entrant->rest_length);
    copy_in(slot->spec, spec, entrant->head_length + entrant->rest_length);
    publish(&fingerprints_of(self)[index], entrant->key.fingerprint);
    publish(&slot->word, next_word(passing, STATUS_PROVISIONING, 0));
}

static int
compare_entrants(const void *one_object, const void *other_object)
{
    const Entrant *one = *(const Entrant *const *)one_object;
    const Entrant *other = *(const Entrant *const *)other_object;
    const int order = memcmp(&one->key, &other->key, sizeof(Key));
    return order != 0 ? order : (one > other) - (one < other);
}

/* Sets `all->repeated` to the first entrant whose id an earlier one has; false if there is no
 * memory. It sorts before the lock is taken, since a batch may be large. */
static bool
find_repeated(Registration *all)
{
    all->repeated = UINT64_MAX;
    if (all->count < 2) {
        return true;
    }
    const Entrant **sorted = allocate(all->count, sizeof *sorted);
    if (sorted == NULL) {
        return false;
    }
    for (uint64_t i = 0; i < all->count; i++) {
        sorted[i] = &all->entrants[i];
    }
    qsort(sorted, all->count, sizeof *sorted, compare_entrants);
    for (uint64_t i = 1; i < all->count; i++) {
        const uint64_t index = (uint64_t)(sorted[i] - all->entrants);
        if (memcmp(&sorted[i - 1]->key, &sorted[i]->key, sizeof(Key)) == 0 && index < all->repeated) {
            all->repeated = index;
        }
    }
    PyMem_Free(sorted);
    return true;
}

/* Whether all of the entrants may be registered. Checked before anything is prepared: the slots
 * that they take may keep outcomes. */
static bool
admit(Registration *all)
{
    Transition *one = &all->base;
    Epoch *self = one->self;
    const uint64_t most = self->room.max_operations;
    const uint64_t limit =
        self->max_concurrent != 0 && self->max_concurrent < most ? self->max_concurrent : most;
    for (uint64_t i = 0; i < all->count; i++) {
        Place place;
        if (!find_operation(self, &one->words, &all->entrants[i].key, &place, &one->refusal)) {
            return false;
        }
        if (place.slot >= 0 || place.seq != 0 || i == all->repeated) {
            return refuse(&one->refusal, "already_registered", (int64_t)i, 0);
        }
    }
    if (one->words.active + all->count > limit) {
        const uint64_t room = limit > one->words.active ? limit - one->words.active : 0;
        return refuse(&one->refusal, "limit", (int64_t)room, one->words.active);
    }
    return true;
}

static void
register_body(void *argument)
{
    Registration *all = argument;
    Transition *one = &all->base;
    Epoch *self = one->self;
    if (!begin(one) || !admit(all)) {
        return;
    }
    Control *control = control_of(self);
    uint64_t birth = one->words.registrations;
    all->first = birth + 1;
    publish(&control->writer.intent, 1);
    for (uint64_t i = 0; i < all->count; i++) {
        const Entrant *entrant = &all->entrants[i];
        const int64_t slot = take_free_slot(self, &one->words);
        if (slot < 0) {
            publish(&control->writer.intent, i != 0); /* the next writer undoes them */
            corrupt(&one->refusal, "free slots", -1, 1, self->room.max_operations, 0);
            return;
        }
        fill_slot(self, (uint64_t)slot, all, entrant, ++birth);
        atomic_store_explicit(&self->hints[entrant->key.fingerprint % HINTS], (uint32_t)slot,
                              memory_order_relaxed);
    }
    commit(self, &control->writer.registrations, birth);
    publish(&control->writer.intent, 0);
}

/* register(((id, head, rest), ...), created_at_ms, created_mono_ns) -> the number of the first
 *
 * Registers operations: all of them in one commit, or none. */
PyObject *
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
    made = made && find_repeated(&all) && run_on_operations(&all.base, true, register_body);
    PyMem_Free(all.entrants);
    return made ? from_u64(all.first) : NULL;
}
