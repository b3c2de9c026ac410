/* Shared by the files about epochs: an epoch, and how a refusal is reported. */

#ifndef SHMEPOCH_EPOCH_H
#define SHMEPOCH_EPOCH_H

#include "common.h"

#define FREE 0 /* the fingerprint of a slot that holds nothing */
#define HINTS 256
/* Far above any feed. Far below the values where adding to a sequence or a position overflows. */
#define LAST_SEQ ((UINT64_C(1) << 63) + (UINT64_C(1) << 62))
#define LAST_POSITION (UINT64_C(1) << 63)
#define LAST_COUNT ((uint64_t)INT64_MAX) /* of a number or time in records and stores */

typedef struct {
    PyObject_HEAD
    Memory *memory;
    WriterLock *lock; /* NULL: an observer's or a copy's, which changes nothing */
    Capacities room;
    uint64_t max_concurrent; /* 0: no limit of its own */
    Shape shape;
    /* Where operations were last found, by their fingerprints: tried first, and always verified. */
    _Atomic uint32_t hints[HINTS];
#ifdef SHMEPOCH_AUDIT
    _Atomic uint64_t commits; /* how many commits this process has made */
#endif
} Epoch;

/* Why a transition was refused or a read failed: a reason, and the facts that it comes with. */
typedef struct {
    const char *reason; /* NULL: it was not */
    const char *field;
    int64_t index; /* of the operation that was asked about, or of the field; -1: of none */
    uint64_t least, most, actual;
} Refusal;

/* Returns false, so that a caller can return the result of this call. */
static inline bool
refuse(Refusal *refusal, const char *reason, int64_t index, uint64_t actual)
{
    *refusal = (Refusal){.reason = reason, .field = "", .index = index, .actual = actual};
    return false;
}

static inline bool
corrupt(Refusal *refusal, const char *field, int64_t index, uint64_t least, uint64_t most,
        uint64_t actual)
{
    *refusal = (Refusal){"corrupt", field, index, least, most, actual};
    return false;
}

/* A number, or a time, that records and stores hold; OverflowError outside their range. */
static inline bool
as_count(PyObject *object, uint64_t *value)
{
    if (!as_u64(object, value)) {
        return false;
    }
    if (*value > LAST_COUNT) {
        PyErr_Format(PyExc_OverflowError, "%R is above 2**63 - 1", object);
        return false;
    }
    return true;
}

/* Whether the epoch has operations at all; ValueError if it has cursors only. */
static inline bool
has_operations(const Epoch *self)
{
    if (self->room.max_operations == 0) {
        PyErr_SetString(PyExc_ValueError, "this memory has room for cursors only");
    }
    return self->room.max_operations != 0;
}

/* Raises `Refused` with the facts of a refusal; returns NULL. */
PyObject *raise_refused(PyObject *epoch, const Refusal *refusal);

/* --- where everything lies -------------------------------------------------------------------- */

static inline Control *
control_of(const Epoch *self)
{
    return (Control *)(void *)self->memory->base;
}

static inline Slot *
slot_at(const Epoch *self, uint64_t index)
{
    return (Slot *)(void *)(self->memory->base + self->shape.slots + index * self->shape.slot_size);
}

static inline word_t *
fingerprints_of(const Epoch *self)
{
    return (word_t *)(void *)(self->memory->base + self->shape.fingerprints);
}

/* A relaxed load is enough under the writer lock, which orders it after the stores of earlier
 * holders, and in a reader that validates its copy afterwards. */
static inline uint64_t
load(const word_t *word)
{
    return atomic_load_explicit(word, memory_order_relaxed);
}

/* Acquire: sees everything that was written before the word was published. */
static inline uint64_t
load_published(const word_t *word)
{
    return atomic_load_explicit(word, memory_order_acquire);
}

/* Release: publishes everything that was written before. */
static inline void
publish(word_t *word, uint64_t value)
{
    atomic_store_explicit(word, value, memory_order_release);
}

/* --- the words that commit (slots.c) --------------------------------------------------------------- */

typedef struct {
    uint64_t registrations, watermark, origin, skipped_after, skipped_through, dropped, collected;
    uint64_t active; /* operations that have not ended */
    uint64_t floor;  /* operations that ended at or before this sequence are not retained */
} Words;

/* Loads the words, and checks those that do not change once an epoch can be found. The rest may be
 * from different moments.
 *
 * OPS-5: loaded before the slots that are compared with them. Words that a killed writer had
 * prepared are undone before their birth or sequence is committed for another operation. So a
 * reader that sees that commit cannot see the leftover. */
bool load_words(const Epoch *self, Words *words, Refusal *refusal);
/* Checks them against each other, under the writer lock. It comes first, since every loop over
 * sequences or slots is bounded by them. */
bool check_words(const Epoch *self, const Words *words, Refusal *refusal);

/* --- operations (slots.c) ------------------------------------------------------------------------- */

typedef struct {
    uint64_t id[2];
    uint64_t fingerprint;
} Key;

/* The key of an operation's id; false with an error set. */
bool parse_key(const Epoch *self, PyObject *object, Key *key);

/* Where an operation is: in a slot, or else in the record that ended it, or in neither. */
typedef struct {
    int64_t slot; /* -1: none */
    uint64_t seq; /* 0: none */
} Place;

/* False where a slot that has the key is damaged. */
bool find_operation(Epoch *self, const Words *words, const Key *key, Place *place,
                    Refusal *refusal);

/* Whether the operation in a slot has ended, as of some words. */
static inline bool
has_ended(const Slot *slot, const Words *words)
{
    const uint64_t seq = load(&slot->terminal_seq);
    return seq != 0 && seq <= words->watermark;
}

/* Whether a slot that is not free holds an operation that `active` counts. */
static inline bool
is_active(const Slot *slot, const Words *words)
{
    const uint64_t birth = load(&slot->birth);
    return birth != 0 && birth <= words->registrations && !has_ended(slot, words);
}

static inline uint64_t
status_of(uint64_t word)
{
    return word & STATUS_MASK;
}

static inline uint64_t
buffer_of(uint64_t word)
{
    return word >> BUFFER_SHIFT & 1;
}

static inline uint64_t
next_word(uint64_t word, uint64_t status, uint64_t buffer)
{
    return ((word >> VERSION_SHIFT) + 1) << VERSION_SHIFT | buffer << BUFFER_SHIFT | status;
}

static inline uint64_t
head_length(uint64_t spec_lengths)
{
    return spec_lengths & UINT32_MAX;
}

static inline uint64_t
rest_length(uint64_t spec_lengths)
{
    return spec_lengths >> 32;
}

/* The slot of a participant, by its key: also the lane of its count among a slot's watchers. */
static inline uint64_t
lane_of(uint64_t participant)
{
    return participant & 0xff;
}

/* How many words the watcher counts of a slot take. */
static inline uint64_t
watcher_words(const Epoch *self)
{
    return padded(2 * self->room.max_participants) / WORD;
}

/* The word that has a participant's count, and where in it. */
static inline word_t *
watcher_word(Slot *slot, uint64_t participant)
{
    return &slot->watchers[lane_of(participant) / 4];
}

static inline uint64_t
watcher_shift(uint64_t participant)
{
    return 16 * (lane_of(participant) % 4);
}

/* Whether each word of a slot is within its bounds. */
bool check_slot(const Epoch *self, uint64_t index, Refusal *refusal);
bool is_watched(const Epoch *self, const Slot *slot);
void free_slot(const Epoch *self, uint64_t index);
/* A slot that holds nothing, or -1. OPS-6: if all are used, it takes the slot of the oldest outcome
 * that is kept for watchers. */
int64_t take_free_slot(const Epoch *self, const Words *words);
/* Undoes what a killed writer had prepared and not committed, and counts that. It may be killed itself,
 * and run again. */
bool repair(const Epoch *self, const Words *words, Refusal *refusal);

/* --- records (ring.c) ----------------------------------------------------------------------------- */

/* The lengths of a record's parts. */
typedef struct {
    uint64_t head, outcome, rest, detail;
} Lengths;

/* The parts themselves. */
typedef struct {
    const unsigned char *head, *outcome, *rest, *detail;
} Parts;

static inline uint64_t
pack_lengths(Lengths of)
{
    return of.detail << 54 | of.rest << 44 | of.head << 32 | of.outcome;
}

static inline Lengths
lengths_of(const Record *record)
{
    return (Lengths){
        .head = record->lengths >> 32 & 0xfff,
        .outcome = record->lengths & UINT32_MAX,
        .rest = record->lengths >> 44 & 0x3ff,
        .detail = record->lengths >> 54,
    };
}

static inline uint64_t
record_size(Lengths of)
{
    return sizeof(Record) + padded(of.head + of.outcome) + padded(of.rest + of.detail);
}

/* The position in a word of the index, of a record or of the next one. */
static inline uint64_t
position_in(uint64_t word)
{
    return word & ~(uint64_t)HAS_RECORD;
}

/* The place of a sequence's word in the index. */
static inline word_t *
index_word(const Epoch *self, uint64_t seq)
{
    word_t *index = (word_t *)(void *)(self->memory->base + self->shape.index);
    return &index[seq % self->shape.index_count];
}

/* The place of a sequence's fingerprint. Sequences that the last recovery skipped have none. */
static inline word_t *
retained_word(const Epoch *self, const Words *words, uint64_t seq)
{
    word_t *retained = (word_t *)(void *)(self->memory->base + self->shape.retained);
    const uint64_t skipped = words->skipped_through - words->skipped_after;
    return &retained[(seq > words->skipped_through ? seq - skipped : seq)
                     % self->shape.retained_count];
}

void ring_copy_out(const Epoch *self, uint64_t position, unsigned char *target, uint64_t length);
void ring_copy_in(const Epoch *self, uint64_t position, const unsigned char *source,
                  uint64_t length);
/* Whether the bytes at a position can be the record of a sequence. They are copied to `record`. */
bool load_record(const Epoch *self, uint64_t position, uint64_t seq, Record *record);
/* Composes a record from its words and parts, and adds the checksums. Returns its size. */
uint64_t compose_record(Record record, const Parts *parts, unsigned char *composed);
/* Whether a copied part of a record is whole: not torn by a writer. */
bool is_whole_first(const Record *record, const unsigned char *first);
bool is_whole_second(const Record *record, const unsigned char *second);

/* Where the next records begin, and what makes room for them: entries through `dropped` are
 * dropped, and kept outcomes through `given_up` are given up. */
typedef struct {
    uint64_t position, dropped, given_up;
} Space;

/* Finds room for `count` records, and drops nothing yet: their commit may still be refused.
 *
 * FEED-3: the records of one commit fit the ring together, so none overwrites another. The records
 * of a full table fit without their details and with a short reason. OPS-6: records that are kept
 * for watchers are passed over. If there is no other room, the oldest are given up first. */
bool find_room(const Epoch *self, const Words *words, uint64_t count, uint64_t size, Space *space,
               Refusal *refusal);

/* Frees the slots that keep outcomes through `given_up`, after the feed has dropped these. */
void give_up_kept(const Epoch *self, const Words *words, const Space *space);

#endif
