/* The byte layout of a segment: the only place that knows an offset, for C and, by the constants that
 * module.c exports, for Python. docs/layout.md draws it.
 *
 * All words are unsigned, 64 bit, in native byte order. A line is 128 bytes, two cache lines, since
 * processors fetch pairs of them.
 */

#ifndef SHMEPOCH_LAYOUT_H
#define SHMEPOCH_LAYOUT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef _Atomic uint64_t word_t;

#define WORD 8
#define LINE 128
#define PAGE 4096

#define LAYOUT_VERSION 3
#define MAGIC UINT64_C(0x68636f70656d6873) /* "shmepoch", read as a little-endian number */

/* The states of an epoch. It is gone when its file lost its name before it was sealed; that state
 * tells the processes that still have the memory, which no other process can attach to. */
#define STATE_OPEN 0
#define STATE_SEALED 1
#define STATE_GONE 2

#define CURSORS 3
#define SPEC_LIMIT 512   /* bytes of an encoded spec */
#define DETAIL_LIMIT 512 /* bytes of an encoded detail */
#define MAX_PARTICIPANTS 208
#define MIN_FEED_ENTRIES 1024
/* RECOVERY-2: how many sequences recovery skips after a reboot. Entries that were committed and not
 * yet stored are lost, but their sequences may have been seen. They must not be used again for
 * other entries. */
#define RECOVERY_SKIP 1024

/* Written once, before the segment has a name. Only the state changes later. */
typedef struct {
    word_t magic;
    word_t version;
    word_t size; /* of the segment, in bytes */
    word_t state;
    word_t epoch_id[2];
    word_t session_id[2];
    word_t witness[2]; /* a handle must carry it */
    word_t max_completed;
    word_t max_concurrent; /* 0: no limit of its own */
    word_t max_operations;
    word_t feed_bytes;
    word_t max_participants;
    word_t store_wait_ms; /* 0: writers drop, and do not wait */
    word_t origin;        /* the watermark at no registration */
    word_t created_at_ms;
    word_t skipped_after;   /* recovery skipped the sequences above this one */
    word_t skipped_through; /* and up to this one */
    word_t checksum;        /* CRC-32 of the six capacities */
    word_t spare[11];
} Header;

typedef struct {
    word_t position;
    word_t spare[15];
} CursorLine;

/* Read by waiters. */
typedef struct {
    word_t watermark; /* THE commit of a transition that ends operations */
    word_t event;     /* futex count and sleepers flag */
    word_t doorbells; /* which doorbells to ring after a commit */
    word_t spare[13];
} FeedLine;

/* Changed by writers, by processes that join, and by the store. */
typedef struct {
    word_t dropped_through; /* raised before entries are overwritten */
    word_t intent;          /* not 0: a transition is in progress */
    word_t registrations;   /* THE commit of a registration */
    word_t collected_through;
    word_t kept;        /* not 0: a slot may keep an outcome for watchers */
    word_t head;        /* where the next record begins; with an intent, perhaps not yet */
    word_t joined;      /* participants that ever joined */
    word_t durable_seq; /* stored through this sequence */
    word_t repairs;     /* how often a writer undid what a killed one had left */
    word_t spare[7];
} WriterLine;

typedef struct {
    Header header;
    CursorLine cursors[CURSORS];
    FeedLine feed;
    WriterLine writer;
} Control;

typedef struct {
    word_t word; /* number << 8 | role; 0: free */
    word_t pid;  /* in its own PID namespace */
    word_t joined_at_ms;
    word_t spare;
} ParticipantSlot;

/* One operation that has not ended, or that has ended and is still watched. It is registered if
 * 0 < birth <= registrations, and has ended if 0 < terminal_seq <= watermark. */
typedef struct {
    word_t word; /* version << 16 | buffer << 8 | status */
    word_t birth;
    word_t terminal_seq;
    word_t id[2];
    word_t participant; /* number << 8 | slot of its runner */
    word_t created_at_ms;
    word_t created_mono_ns;
    word_t started;       /* 1 + the time; 0: not started */
    word_t position;      /* of the record that ended it */
    word_t spec_lengths;  /* of the rest << 32 | of the head */
    word_t detail_length[2];
    word_t spare[3];
    word_t spec[SPEC_LIMIT / WORD]; /* the head, which the entry has too, then the rest */
    word_t details[2][DETAIL_LIMIT / WORD];
    word_t watchers[]; /* a 16-bit count for each participant slot */
} Slot;

/* The status bits of a slot's word; ended operations have the status of their entry. */
#define STATUS_ABSENT 0
#define STATUS_PROVISIONING 1
#define STATUS_RUNNING 2
#define STATUS_RETIRING 3
#define STATUS_MASK 3
#define BUFFER_SHIFT 8
#define VERSION_SHIFT 16
#define SPARE_BITS 0xfefc /* neither version, nor buffer, nor status: always zero */

/* A record of the byte ring: these words and two parts, each padded to words. The first part is for
 * readers of the feed: the head of the operation, and its outcome. The second is the rest of the
 * spec, and the last detail. */
typedef struct {
    uint64_t seq;
    uint64_t birth; /* 0: the registry does not hold the operation */
    uint64_t id[2];
    uint64_t created_at_ms;
    uint64_t started; /* 1 + the time; 0: never started */
    uint64_t completed_at_ms;
    uint64_t elapsed_ms;
    uint64_t lengths;   /* of detail << 54 | of rest << 44 | of head << 32 | of outcome */
    uint64_t checksums; /* of the second part << 32 | of the first */
} Record;

#define HEAD_LIMIT 4095 /* bytes of a head that a store brings back */

/* An index word is the position of a sequence's record, with this bit; without it, the sequence was
 * skipped, and the next record begins at the position. */
#define HAS_RECORD 1

#define OFFSET(field, at) \
    _Static_assert(offsetof(Control, field) == (at), "the place of " #field " is part of the layout")
OFFSET(header.magic, 0);
OFFSET(header.state, 24);
OFFSET(header.epoch_id, 32);
OFFSET(header.witness, 64);
OFFSET(header.max_completed, 80);
OFFSET(header.origin, 128);
OFFSET(header.checksum, 160);
OFFSET(cursors, 256);
OFFSET(feed.watermark, 640);
OFFSET(writer.dropped_through, 768);
#undef OFFSET
_Static_assert(sizeof(Control) == 896, "the participants follow after seven lines");
_Static_assert(sizeof(ParticipantSlot) == 32, "four participants a line");
_Static_assert(offsetof(Slot, spec) == LINE, "the words of a slot take a line");
_Static_assert(offsetof(Slot, watchers) == LINE + SPEC_LIMIT + 2 * DETAIL_LIMIT,
               "the watchers end a slot");
_Static_assert(sizeof(Record) == 80, "a record has ten words before its parts");

/* Locks are open-file-description locks on single bytes; they need no byte to exist there. */
#define WRITER_BYTE 0   /* held during a transition, by the writer */
#define RUNTIME_BYTE 1  /* while it lives, by the session's runtime */
#define PRESENCE_BYTE 2 /* while attached, by every attachment, shared; alone: a removal of the file */
#define AGENT_BYTE 3    /* until it is closed, by the session's agent; shared: agents that agreed to it */
#define LOOP_BYTE 4     /* while it runs, by the runtime loop */
#define PARTICIPANT_BYTE 5 /* + i, while it lives, by the participant in slot i */

/* The layout follows from these. All zero but the participants: room for cursors only. */
typedef struct {
    uint64_t max_completed, max_operations, feed_bytes, max_participants;
} Capacities;

/* Where the parts of a segment lie, after the Control and in this order, and how many entries they
 * have. */
typedef struct {
    uint64_t participants; /* max_participants of ParticipantSlot */
    uint64_t fingerprints; /* a word for each slot, to search ids by; 0: the slot is free */
    uint64_t retained;     /* a fingerprint for each of the last sequences */
    uint64_t retained_count;
    uint64_t index; /* a word for each of the last sequences: where its record is */
    uint64_t index_count;
    uint64_t slots; /* max_operations of Slot */
    uint64_t slot_size;
    uint64_t records; /* feed_bytes of the byte ring */
    uint64_t size;    /* of the segment */
} Shape;

static inline uint64_t
aligned(uint64_t offset, uint64_t to)
{
    return (offset + to - 1) / to * to;
}

static inline uint64_t
larger(uint64_t one, uint64_t other)
{
    return one > other ? one : other;
}

/* False if no segment is that large: each capacity is at most 2**31. */
static inline bool
shape_of(const Capacities *room, Shape *shape)
{
    const uint64_t most = UINT64_C(1) << 31;
    if (room->max_completed > most || room->max_operations > most || room->feed_bytes > most
        || room->feed_bytes % WORD != 0 || room->max_participants > MAX_PARTICIPANTS) {
        return false;
    }
    *shape = (Shape){.participants = sizeof(Control)};
    uint64_t end = shape->participants + room->max_participants * sizeof(ParticipantSlot);
    if (room->max_operations > 0) {
        shape->fingerprints = aligned(end, LINE);
        shape->retained = shape->fingerprints + room->max_operations * WORD;
        /* One commit ends max_operations at most, and overwrites nothing that is retained yet. */
        shape->retained_count = room->max_completed + room->max_operations;
        shape->index = aligned(shape->retained + shape->retained_count * WORD, LINE);
        shape->index_count = larger(MIN_FEED_ENTRIES, larger(4 * room->max_completed,
                                                             2 * room->max_operations))
                             + RECOVERY_SKIP;
        shape->slots = aligned(shape->index + shape->index_count * WORD, LINE);
        shape->slot_size = aligned(sizeof(Slot) + aligned(2 * room->max_participants, WORD), LINE);
        shape->records = shape->slots + room->max_operations * shape->slot_size;
        end = shape->records + room->feed_bytes;
    }
    shape->size = aligned(end, PAGE);
    return true;
}

/* The constants that Python gets, by their names there. */
#define LAYOUT_CONSTANTS(X)                                                                         \
    X("WORD", WORD) X("LINE", LINE) X("PAGE", PAGE) X("VERSION", LAYOUT_VERSION)                      \
    X("OPEN", STATE_OPEN) X("SEALED", STATE_SEALED) X("GONE", STATE_GONE)                             \
    X("MAGIC_AT", offsetof(Control, header.magic))                                                   \
    X("VERSION_AT", offsetof(Control, header.version))                                               \
    X("SIZE_AT", offsetof(Control, header.size))                                                     \
    X("STATE_AT", offsetof(Control, header.state))                                                   \
    X("EPOCH_ID_AT", offsetof(Control, header.epoch_id))                                             \
    X("SESSION_ID_AT", offsetof(Control, header.session_id))                                         \
    X("WITNESS_AT", offsetof(Control, header.witness))                                               \
    X("CAPACITIES_AT", offsetof(Control, header.max_completed))                                      \
    X("CAPACITIES", (offsetof(Control, header.origin) - offsetof(Control, header.max_completed))     \
                        / WORD)                                                                      \
    X("ORIGIN_AT", offsetof(Control, header.origin))                                                 \
    X("CREATED_AT", offsetof(Control, header.created_at_ms))                                         \
    X("SKIPPED_AT", offsetof(Control, header.skipped_after))                                         \
    X("CHECKSUM_AT", offsetof(Control, header.checksum)) X("HEADER_SIZE", sizeof(Header))            \
    X("ID_SIZE", 16) X("CURSORS_AT", offsetof(Control, cursors)) X("CURSORS", CURSORS)               \
    X("WATERMARK_AT", offsetof(Control, feed.watermark))                                             \
    X("EVENT_AT", offsetof(Control, feed.event))                                                     \
    X("DOORBELLS_AT", offsetof(Control, feed.doorbells))                                             \
    X("DROPPED_AT", offsetof(Control, writer.dropped_through))                                       \
    X("INTENT_AT", offsetof(Control, writer.intent))                                                 \
    X("REGISTRATIONS_AT", offsetof(Control, writer.registrations))                                   \
    X("COLLECTED_AT", offsetof(Control, writer.collected_through))                                   \
    X("KEPT_AT", offsetof(Control, writer.kept)) X("HEAD_AT", offsetof(Control, writer.head))        \
    X("JOINED_AT", offsetof(Control, writer.joined))                                                  \
    X("DURABLE_AT", offsetof(Control, writer.durable_seq))                                           \
    X("REPAIRS_AT", offsetof(Control, writer.repairs)) X("PARTICIPANTS_AT", sizeof(Control))         \
    X("PARTICIPANT_SIZE", sizeof(ParticipantSlot))                                                   \
    X("PARTICIPANT_PID", offsetof(ParticipantSlot, pid))                                             \
    X("PARTICIPANT_JOINED", offsetof(ParticipantSlot, joined_at_ms))                                 \
    X("SLOT_WORD", offsetof(Slot, word)) X("SLOT_BIRTH", offsetof(Slot, birth))                      \
    X("SLOT_TERMINAL_SEQ", offsetof(Slot, terminal_seq)) X("SLOT_ID", offsetof(Slot, id))            \
    X("SLOT_PARTICIPANT", offsetof(Slot, participant))                                               \
    X("SLOT_CREATED_MS", offsetof(Slot, created_at_ms))                                              \
    X("SLOT_CREATED_MONO", offsetof(Slot, created_mono_ns))                                          \
    X("SLOT_STARTED", offsetof(Slot, started))                                              \
    X("SLOT_POSITION", offsetof(Slot, position))                                                     \
    X("SLOT_SPEC_LENGTHS", offsetof(Slot, spec_lengths))                                             \
    X("SLOT_DETAIL_LENGTH", offsetof(Slot, detail_length)) X("SLOT_SPEC", offsetof(Slot, spec))      \
    X("SLOT_DETAIL", offsetof(Slot, details)) X("SLOT_WATCHERS", offsetof(Slot, watchers))           \
    X("SPEC_LIMIT", SPEC_LIMIT) X("DETAIL_LIMIT", DETAIL_LIMIT)                                      \
    X("RECORD_SIZE", sizeof(Record)) X("RECORD_LENGTHS", offsetof(Record, lengths))                  \
    X("HAS_RECORD", HAS_RECORD) X("STATUS_MASK", STATUS_MASK)                                        \
    X("RECORD_CHECKSUMS", offsetof(Record, checksums)) X("HEAD_LIMIT", HEAD_LIMIT)                   \
    X("MAX_PARTICIPANTS", MAX_PARTICIPANTS)                                                          \
    X("MIN_FEED_ENTRIES", MIN_FEED_ENTRIES) X("RECOVERY_SKIP", RECOVERY_SKIP)                        \
    X("WRITER_BYTE", WRITER_BYTE) X("RUNTIME_BYTE", RUNTIME_BYTE)                                    \
    X("PRESENCE_BYTE", PRESENCE_BYTE) X("AGENT_BYTE", AGENT_BYTE) X("LOOP_BYTE", LOOP_BYTE)          \
    X("PARTICIPANT_BYTE", PARTICIPANT_BYTE)

#endif
