/* Shared by the files of the transitions: how each begins, is run, commits, and finds its
 * operations. */

#ifndef SHMEPOCH_TRANSITION_H
#define SHMEPOCH_TRANSITION_H

#include "epoch.h"

/* Far above the room of any feed, and within the lengths of a record. */
#define OUTCOME_LIMIT (UINT32_MAX / 2)
/* How often a reader starts again, at most, while writers are faster than it. */
#define PASSES 100000

/* The first member of each transition: its epoch, and why it was refused. */
typedef struct {
    Epoch *self;
    Words words;
    Refusal refusal;
} Transition;

/* Loads the words of the epoch, and repairs what a killed writer left. */
bool mend(Transition *one);
/* The same, if the epoch is open: each transition starts with it. */
bool begin(Transition *one);
/* Runs a transition's body under the writer lock; false with an error set, if it was not made. */
bool run(Transition *one, bool wait, void (*body)(void *));
/* The same, for a transition of operations. */
bool run_on_operations(Transition *one, bool wait, void (*body)(void *));
/* THE one store that makes a transition true. Release: it publishes all prepared words. */
void commit(Epoch *self, word_t *word, uint64_t value);
/* Ends the epoch for good, under the lock; false if it is gone. */
bool seal(Transition *one);

/* --- arguments --- */

bool check_tuple(PyObject *object, const char *of);
bool parse_bytes(PyObject *object, uint64_t limit, const unsigned char **data, uint64_t *length);
/* The index of a slot; IndexError if there is none. */
bool parse_index(const Epoch *self, PyObject *object, uint64_t *index);
/* Memory for `count` of a transition's operations, zeroed; at least one, so that NULL is a failure. */
void *allocate(uint64_t count, size_t size);

/* --- the operations that a transition is about --- */

/* The slot of an operation whose status is in the bits of `statuses`; -1 if it is refused. */
int64_t find_allowed(Transition *one, const Key *key, uint64_t statuses, int64_t index);

/* One of several operations that a transition is about. */
typedef struct {
    Key key;
    const unsigned char *outcome; /* how it ends */
    uint64_t length;
    uint64_t slot;
} Subject;

typedef struct {
    Transition base;
    Subject *subjects;
    uint64_t count, statuses;
    unsigned char *seen; /* for each slot, whether one of the subjects is in it */
} Subjects;

/* Finds all of them before any is changed. An operation that is there twice is refused, as if the
 * first change had been made already. */
bool find_subjects(Subjects *all);
bool allocate_subjects(Subjects *all, uint64_t count);
void free_subjects(Subjects *all);

/* --- the methods of an Epoch, by the files that have them --- */

typedef PyObject *Method(PyObject *object, PyObject *const *args, Py_ssize_t nargs);

Method epoch_register;                                            /* registering.c */
Method epoch_start, epoch_change;                                 /* changing.c */
Method epoch_end, epoch_terminate;                                /* ending.c */
Method epoch_collect, epoch_watch_each;                           /* watching.c */
PyObject *epoch_watch(PyObject *object, PyObject *id);            /* watching.c */
Method epoch_restore;                                             /* restoring.c */
Method epoch_list_since;                                          /* feed.c */
Method epoch_outcome;                                             /* reading.c */
PyObject *epoch_words(PyObject *object, PyObject *ignored);       /* reading.c */
PyObject *epoch_active(PyObject *object, PyObject *ignored);      /* reading.c */
PyObject *epoch_used(PyObject *object, PyObject *ignored);        /* reading.c */
PyObject *epoch_find(PyObject *object, PyObject *id);             /* reading.c */
PyObject *epoch_slot(PyObject *object, PyObject *index);          /* reading.c */
PyObject *epoch_record(PyObject *object, PyObject *seq);          /* reading.c */

#endif
