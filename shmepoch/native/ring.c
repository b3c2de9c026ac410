/* Records in the byte ring: how they are written, found and checked.
 *
 * FEED-2: `dropped_through` is raised before the entries that it covers are overwritten. A reader
 * copies first and loads it afterwards. So the reader knows that a record which was overwritten
 * during the copy is dropped, and does not return it.
 */

#include "epoch.h"

static word_t *
ring_word(const Epoch *self, uint64_t at)
{
    return (word_t *)(void *)(self->memory->base + self->shape.records + at);
}

/* One division for all words: only the first place needs it. */
void
ring_copy_out(const Epoch *self, uint64_t position, unsigned char *target, uint64_t length)
{
    const uint64_t at = position % self->room.feed_bytes, left = self->room.feed_bytes - at;
    const uint64_t first = length < left ? length : left;
    copy_out(ring_word(self, at), target, first);
    copy_out(ring_word(self, 0), target + first, length - first);
}

void
ring_copy_in(const Epoch *self, uint64_t position, const unsigned char *source, uint64_t length)
{
    const uint64_t at = position % self->room.feed_bytes, left = self->room.feed_bytes - at;
    const uint64_t first = length < left ? length : left;
    copy_in(ring_word(self, at), source, first);
    copy_in(ring_word(self, 0), source + first, length - first);
}

bool
load_record(const Epoch *self, uint64_t position, uint64_t seq, Record *record)
{
    if (position % WORD != 0) {
        return false;
    }
    ring_copy_out(self, position, (unsigned char *)record, sizeof *record);
    const Lengths lengths = lengths_of(record);
    return record->seq == seq && lengths.rest <= SPEC_LIMIT && lengths.detail <= DETAIL_LIMIT
           && record_size(lengths) <= self->room.feed_bytes && record->created_at_ms <= LAST_COUNT
           && record->started <= LAST_COUNT + 1 && record->completed_at_ms <= LAST_COUNT
           && record->elapsed_ms <= LAST_COUNT;
}

/* FNV-1a over words instead of bytes. The seed is made of the record's own words, so a torn record,
 * or one of another sequence, does not match. It protects from races, not from attackers. */
static uint64_t
checksum_step(uint64_t sum, uint64_t value)
{
    sum = (sum ^ value) * UINT64_C(0x100000001b3);
    return sum ^ (sum >> 29);
}

static uint64_t
checksum(uint64_t seed, const unsigned char *data, uint64_t length)
{
    uint64_t sum = checksum_step(UINT64_C(0xcbf29ce484222325) ^ seed, length);
    for (uint64_t done = 0; done < length; done += WORD) {
        sum = checksum_step(sum, word_from(data + done, length - done));
    }
    return (sum ^ sum >> 32) & UINT32_MAX;
}

static uint64_t
first_checksum(const Record *record, const unsigned char *first)
{
    const uint64_t words[] = {record->seq, record->id[0], record->id[1], record->completed_at_ms};
    const Lengths lengths = lengths_of(record);
    uint64_t seed = record->lengths;
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        seed = checksum_step(seed, words[i]);
    }
    return checksum(seed, first, lengths.head + lengths.outcome);
}

static uint64_t
second_checksum(const Record *record, const unsigned char *second)
{
    const uint64_t words[] = {record->seq, record->birth, record->created_at_ms, record->started,
                              record->elapsed_ms};
    const Lengths lengths = lengths_of(record);
    uint64_t seed = record->lengths;
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        seed = checksum_step(seed, words[i]);
    }
    return checksum(seed, second, lengths.rest + lengths.detail);
}

uint64_t
compose_record(Record record, const Parts *parts, unsigned char *composed)
{
    const Lengths of = lengths_of(&record);
    unsigned char *first = composed + sizeof record;
    unsigned char *second = first + padded(of.head + of.outcome);
    memset(composed, 0, record_size(of)); /* the padding of the parts */
    memcpy(first, parts->head, of.head);
    memcpy(first + of.head, parts->outcome, of.outcome);
    memcpy(second, parts->rest, of.rest);
    memcpy(second + of.rest, parts->detail, of.detail);
    record.checksums = second_checksum(&record, second) << 32 | first_checksum(&record, first);
    memcpy(composed, &record, sizeof record);
    return record_size(of);
}

bool
is_whole_first(const Record *record, const unsigned char *first)
{
    return first_checksum(record, first) == (record->checksums & UINT32_MAX);
}

bool
is_whole_second(const Record *record, const unsigned char *second)
{
    return second_checksum(record, second) == record->checksums >> 32;
}

/* --- room -------------------------------------------------------------------------------------- */

static uint64_t
position_of(const Epoch *self, uint64_t seq)
{
    return position_in(load(index_word(self, seq)));
}

/* Sets `dropped`: entries through it must be dropped, so that records up to the position `end` have
 * their room and their index words. */
static bool
drop_for(const Epoch *self, const Words *words, uint64_t last, uint64_t head, uint64_t end,
         uint64_t *dropped, Refusal *refusal)
{
    *dropped = words->dropped;
    if (last - *dropped > self->shape.index_count) {
        *dropped = last - self->shape.index_count;
    }
    for (; *dropped < words->watermark; ++*dropped) {
        const uint64_t oldest = position_of(self, *dropped + 1);
        if (oldest > head) {
            return corrupt(refusal, "feed.position", (int64_t)*dropped + 1, 0, head, oldest);
        }
        if (oldest + self->room.feed_bytes >= end) {
            return true;
        }
    }
    return true;
}

/* Whether a slot holds an operation that has ended, for its watchers. */
static bool
keeps_outcome(const Epoch *self, const Words *words, uint64_t index)
{
    return load(&fingerprints_of(self)[index]) != FREE && has_ended(slot_at(self, index), words);
}

/* Whether a slot keeps a record that the feed no longer holds after the drops in `space`. */
static bool
is_kept(const Epoch *self, const Words *words, uint64_t index, const Space *space, uint64_t *begin,
        uint64_t *size)
{
    const Slot *slot = slot_at(self, index);
    const uint64_t seq = load(&slot->terminal_seq);
    Record record;
    if (!keeps_outcome(self, words, index) || seq > space->dropped || seq <= space->given_up) {
        return false;
    }
    *begin = load(&slot->position);
    if (*begin > LAST_POSITION || !load_record(self, *begin, seq, &record)) {
        return false; /* it is gone */
    }
    *size = record_size(lengths_of(&record));
    return true;
}

/* How far records of `size` bytes at `space->position` must move up to be clear of a kept record; 0
 * if no kept record is in the way. `oldest` becomes the sequence of the oldest kept record. */
static uint64_t
kept_in_the_way(const Epoch *self, const Words *words, const Space *space, uint64_t size,
                uint64_t *oldest)
{
    const uint64_t budget = self->room.feed_bytes, begin = space->position;
    uint64_t move = 0, kept_at, kept_size;
    *oldest = UINT64_MAX;
    for (uint64_t index = 0; index < self->room.max_operations; index++) {
        if (!is_kept(self, words, index, space, &kept_at, &kept_size)) {
            continue;
        }
        const uint64_t seq = load(&slot_at(self, index)->terminal_seq);
        *oldest = seq < *oldest ? seq : *oldest;
        /* Both are spans of one circle. */
        const uint64_t into = (begin % budget + budget - kept_at % budget) % budget;
        if (into < kept_size) {
            move = kept_size - into;
        }
        else if (budget - into < size) {
            move = budget - into + kept_size;
        }
    }
    return move;
}

static bool
is_any_kept(const Epoch *self, const Words *words)
{
    for (uint64_t index = 0; index < self->room.max_operations; index++) {
        if (keeps_outcome(self, words, index)) {
            return true;
        }
    }
    return false;
}

void
give_up_kept(const Epoch *self, const Words *words, const Space *space)
{
    for (uint64_t index = 0; space->given_up != 0 && index < self->room.max_operations; index++) {
        if (keeps_outcome(self, words, index)
            && load(&slot_at(self, index)->terminal_seq) <= space->given_up) {
            free_slot(self, index);
        }
    }
}

bool
find_room(const Epoch *self, const Words *words, uint64_t count, uint64_t size, Space *space,
          Refusal *refusal)
{
    const uint64_t last = words->watermark + count;
    if (size > self->room.feed_bytes || count > self->shape.index_count) {
        return refuse(refusal, "too_large", (int64_t)count, size);
    }
    Control *control = control_of(self);
    const uint64_t head = load(&control->writer.head);
    if (head % WORD != 0 || head > LAST_POSITION) {
        return corrupt(refusal, "head", -1, 0, LAST_POSITION, head);
    }
    bool kept = load(&control->writer.kept) != 0;
    if (kept && !is_any_kept(self, words)) {
        kept = false;
        publish(&control->writer.kept, 0);
    }
    *space = (Space){.position = head};
    for (;;) {
        if (!drop_for(self, words, last, head, space->position + size, &space->dropped, refusal)) {
            return false;
        }
        uint64_t oldest;
        const uint64_t move = kept ? kept_in_the_way(self, words, space, size, &oldest) : 0;
        if (move == 0) {
            return true;
        }
        space->position += move;
        if (space->position + size - head > self->room.feed_bytes) {
            space->given_up = oldest;
            space->position = head;
        }
    }
}
