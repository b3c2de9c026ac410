/* Transitions that do not end an operation. */

#include "transition.h"

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
 * Starts operations one by one, if all of them may start. No start is before its registration. */
PyObject *
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
        buffer ^= 1; /* the one that no reader reads */
        atomic_thread_fence(memory_order_release);
        copy_in(slot->details[buffer], change->detail, change->length);
        publish(&slot->detail_length[buffer], change->length);
    }
    commit(one->self, &slot->word, next_word(word, status, buffer));
}

/* change(id, statuses, target, word, detail)
 *
 * Changes an operation whose status is in the bits of `statuses`: to the status `target`, unless
 * that is 0, and to `detail`, unless that is None. The detail was made from what `slot` returned,
 * so it is refused if the slot's word is no longer `word`. */
PyObject *
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
