"""The byte layout of a segment: the only place that knows an offset.

A segment is, from its first byte on:

    part          size                                        holds
    header        256                                         what was fixed at creation, the state
    cursors       3 x 128                                     one cursor a line
    feed line     128                                         what waiters look at
    writer line   128                                         what only the writer's side changes
    participants  max_participants x 32                       the attached processes
    fingerprints  slots x 8                                   the column that ids are searched in
    slots         slots x 2048                                one operation each
    index ring    entries x 24                                where each completion lies
    byte ring     feed_bytes                                  the encoded completions

where slots = max_operations + max_completed and entries = max(1024, 4 * max_completed,
2 * slots) + 1024, the last for sequences that recovery skips. Memory that holds cursors only has
everything up to the participants: one page.

All words are unsigned, 64 bit, in native byte order. A line is 128 bytes, two cache lines, since
processors fetch pairs of them.

    offset  field                 changed by        ordering  meaning
    ------  --------------------  ----------------  --------  ----------------------------------
         0  magic                 creator           release   stored last: the header is whole
         8  version               creator                     of this table
        16  size                  creator                     of the segment, in bytes
        24  state                 adapter           release   0 open, 1 sealed, 2 gone: a gate
        32  epoch id (16)         creator
        48  session id (16)       creator
        64  witness key (16)      creator                     a handle must carry it
        80  max_completed         creator                     terminal operations retained
        88  max_concurrent        creator                     0: no limit of its own
        96  max_operations        creator                     room for operations not ended
       104  feed_bytes            creator                     size of the byte ring
       112  max_participants      creator
       120  store_wait_ms         creator                     0: writers drop, and do not wait
       128  origin                creator                     watermark at no registration
       136  created_at_ms         creator                     wall clock
       144  skipped_after         creator                     recovery skipped those above it
       152  skipped_through       creator                     and up to this one
       160  checksum              creator                     CRC-32 of the capacities
       256  agent_applied         agent             acq_rel   cursor
       384  runtime_observed      runtime loop      acq_rel   cursor
       512  runtime_injected      runtime loop      acq_rel   cursor
       640  watermark             writer            release   THE commit of a terminal transition
       648  event                 writer, waiters   seq_cst   futex count, sleepers flag
       656  bells                 waiters, writer   seq_cst   which bells to ring after a commit
       768  dropped_through       writer            release   raised before entries are overwritten
       776  intent                writer            release   not 0: a transition is in progress
       784  registrations         writer            release   THE commit of a registration
       792  collected_through     writer            release   drained by collect_completed
       800  reclaimed_through     writer            release   slots of completions given back
       808  joined                participants      seq_cst   participants that ever joined
       816  durable_seq           persistence       release   what a store holds

A participant, every 32 bytes:

         0  word                  participant       release   number << 8 | role; 0: free
         8  pid                   participant                 in its own PID namespace
        16  joined_at_ms          participant                 wall clock

A slot, every 2048 bytes; it holds an operation if 0 < birth <= registrations:

         0  word                  writer            release   version << 16 | buffer << 8 | status
         8  birth                 writer            release   its registration's number
        16  terminal_seq          writer            release   terminal if 0 < it <= watermark
        24  operation id (16)     writer
        40  participant           writer                      number << 8 | slot of its runner
        48  created_at_ms         writer                      wall clock
        56  created_mono_ns       writer                      CLOCK_MONOTONIC
        64  elapsed_ms            writer                      from registration to the end
        72  spec_length           writer                      of the encoded spec
        80  detail_length (2)     writer                      of each detail buffer
        96  watchers              writer                      16-bit count per participant slot
       512  spec (512)            writer                      fixed once registered
      1024  details (2 x 512)     writer                      the word says which one is current

With buffer 1 and status 0 a slot holds, in place of the spec and the details, an outcome that is
kept for its watchers: its length in 8 bytes, and 1528 bytes of the entry. The rest of it lies in
other slots, 1536 bytes each, that have its fingerprint, its terminal_seq, no birth, and in place of
elapsed_ms the number of the piece.

An index entry, every 24 bytes: position in the byte ring (grows for ever), checksum,
slot << 32 | length. A length of 0 is a sequence that recovery skipped.

Locks are open-file-description locks on single bytes; they need no byte to exist there:

      byte  held                  by
         0  during a transition   the writer
         1  while it lives        the session's runtime
         2  while attached        every attachment, shared; exclusive: a removal of the file
         3  until it is closed    the session's agent; shared: agents that agreed to share
         4  while it runs         the runtime loop
     5 + i  while it lives        the participant in slot i
"""

from __future__ import annotations

import operator
from typing import Final, TypeAlias

import msgspec

from shmepoch.errors import ConfigInvalid

Ring: TypeAlias = tuple[int, int, int, int]
"""Index ring offset, its capacity in entries, byte ring offset, its size in bytes."""

MAGIC: Final = int.from_bytes(b"shmepoch", "little")
VERSION: Final = 2

WORD: Final = 8
LINE: Final = 128
PAGE: Final = 4096

#: The states of an epoch. It is gone when its file lost its name before it was sealed; that stands
#: only in memory that no process can attach to any more, and says so to those that have it.
OPEN: Final = 0
SEALED: Final = 1
GONE: Final = 2

# --- header ---
MAGIC_AT: Final = 0
VERSION_AT: Final = 8
SIZE_AT: Final = 16
STATE_AT: Final = 24
EPOCH_ID_AT: Final = 32
SESSION_ID_AT: Final = 48
WITNESS_AT: Final = 64
CAPACITIES_AT: Final = 80
CAPACITIES: Final = 6
ORIGIN_AT: Final = 128
CREATED_AT: Final = 136
SKIPPED_AT: Final = 144
CHECKSUM_AT: Final = 160
HEADER_SIZE: Final = 2 * LINE
ID_SIZE: Final = 16

# --- cursors ---
CURSORS_AT: Final = HEADER_SIZE
CURSORS: Final = 3

# --- feed line ---
WATERMARK_AT: Final = CURSORS_AT + CURSORS * LINE
EVENT_AT: Final = WATERMARK_AT + WORD
BELLS_AT: Final = EVENT_AT + WORD

# --- writer line ---
DROPPED_AT: Final = WATERMARK_AT + LINE
INTENT_AT: Final = DROPPED_AT + WORD
REGISTRATIONS_AT: Final = INTENT_AT + WORD
COLLECTED_AT: Final = REGISTRATIONS_AT + WORD
RECLAIMED_AT: Final = COLLECTED_AT + WORD
JOINED_AT: Final = RECLAIMED_AT + WORD
DURABLE_AT: Final = JOINED_AT + WORD

# --- participants ---
PARTICIPANTS_AT: Final = DROPPED_AT + LINE
PARTICIPANT_SIZE: Final = 32
PARTICIPANT_PID: Final = 8
PARTICIPANT_JOINED: Final = 16

# --- a slot ---
SLOT_SIZE: Final = 2048
SLOT_WORD: Final = 0
SLOT_BIRTH: Final = 8
SLOT_TERMINAL_SEQ: Final = 16
SLOT_ID: Final = 24
SLOT_PARTICIPANT: Final = 40
SLOT_CREATED_MS: Final = 48
SLOT_CREATED_MONO: Final = 56
SLOT_ELAPSED_MS: Final = 64
SLOT_SPEC_LENGTH: Final = 72
SLOT_DETAIL_LENGTH: Final = 80
SLOT_WATCHERS: Final = 96
SLOT_SPEC: Final = 512
SPEC_LIMIT: Final = 512
SLOT_DETAIL: Final = 1024
DETAIL_LIMIT: Final = 512
#: What a detail has besides the peer handle takes 50 bytes, and some of a message shall always fit.
PEER_HANDLE_LIMIT: Final = 400

SLOT_KEPT: Final = SLOT_SPEC
KEPT_LIMIT: Final = SLOT_SIZE - SLOT_KEPT

MAX_PARTICIPANTS: Final = (SLOT_SPEC - SLOT_WATCHERS) // 2

# --- index ring ---
INDEX_SIZE: Final = 24
MIN_FEED_ENTRIES: Final = 1024
#: An hour: a writer that has waited longer for a store needs to be told.
MAX_STORE_WAIT_MS: Final = 3_600_000
#: RECOVERY-2: how many sequences recovery skips after a reboot. What was committed and not yet
#: stored is gone, but its sequences may have been seen, and must not come again as something else.
RECOVERY_SKIP: Final = 1024

# --- lock bytes ---
WRITER_BYTE: Final = 0
RUNTIME_BYTE: Final = 1
PRESENCE_BYTE: Final = 2
AGENT_BYTE: Final = 3
LOOP_BYTE: Final = 4
PARTICIPANT_BYTE: Final = 5


class OpsLifecycleConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How large an epoch is; every size in its memory follows from these.

    Fixed are, encoded: 512 bytes for an operation's spec, 400 for its peer handle, and 512 for that
    together with its last progress, whose message is cut to what fits.

    Raises `ConfigInvalid` for a value outside its range.
    """

    max_completed: int = 256
    """Terminal operations retained; the oldest is evicted first."""
    max_concurrent: int | None = None
    """Operations that have not ended, at most; None: only `max_operations` limits them."""
    max_operations: int = 128
    """Room in the table for operations that have not ended."""
    feed_bytes: int = 512 * 1024
    """Room for encoded completions; one that is larger is refused."""
    max_participants: int = 64
    """Processes attached at the same time."""
    store_wait_ms: int = 0
    """How long a call that ends operations waits for a store that is behind: that lacks what would
    have to be dropped from a full feed, or more than 1,024 completions. Then it raises
    `StoreBehind`, and the operation is as it was. 0: it does not wait, and what is dropped before
    it was stored is a gap."""

    def __post_init__(self) -> None:
        self._settle("max_completed", 1, 2**20)
        self._settle("max_operations", 1, 2**20)
        self._settle("max_participants", 1, MAX_PARTICIPANTS)
        self._settle("store_wait_ms", 0, MAX_STORE_WAIT_MS)
        # Every operation of a full table must be able to end in one commit (FEED-3).
        self._settle("feed_bytes", least_feed_bytes(self.max_operations), 2**31)
        if self.feed_bytes % WORD:
            raise ConfigInvalid("feed_bytes", self.feed_bytes, f"a multiple of {WORD}")
        if self.max_concurrent is not None:
            most = self.max_operations
            allowed = f"None, or an integer from 1 to max_operations, which is {most}"
            self._settle("max_concurrent", 1, most, allowed)

    def _settle(self, setting: str, lowest: int, highest: int, allowed: str = "") -> None:
        """Make a setting a plain int, of whatever type of integer it is, within its range."""
        value = getattr(self, setting)
        number = operator.index(value) if hasattr(value, "__index__") else lowest - 1
        if isinstance(value, bool) or not lowest <= number <= highest:
            allowed = allowed or f"an integer from {lowest} to {highest}"
            raise ConfigInvalid(setting, value, allowed)
        if number is not value:
            msgspec.structs.force_setattr(self, setting, number)


def least_feed_bytes(max_operations: int) -> int:
    """The smallest feed of an epoch with room for so many operations."""
    return PAGE + max_operations * 2 * SPEC_LIMIT


class Layout:
    """Where everything lies in one segment: derived from its configuration, never stored.

    `config` None lays out cursors only.
    """

    def __init__(self, config: OpsLifecycleConfig | None) -> None:
        self.config: Final = config
        self.max_participants: Final = (config or OpsLifecycleConfig()).max_participants
        end = PARTICIPANTS_AT + self.max_participants * PARTICIPANT_SIZE
        if config is not None:
            self.slots: Final = config.max_operations + config.max_completed
            self.fingerprints: Final = _aligned(end, LINE)
            self.slots_at: Final = _aligned(self.fingerprints + self.slots * WORD, LINE)
            index = self.slots_at + self.slots * SLOT_SIZE
            retained = max(MIN_FEED_ENTRIES, 4 * config.max_completed, 2 * self.slots)
            entries = retained + RECOVERY_SKIP
            data = _aligned(index + entries * INDEX_SIZE, LINE)
            self.ring: Final[Ring] = (index, entries, data, config.feed_bytes)
            end = data + config.feed_bytes
        self.size: Final = _aligned(end, PAGE)

    def capacities(self) -> tuple[int, ...]:
        """The words at `CAPACITIES_AT`, from which `from_capacities` rebuilds this layout."""
        config = self.config
        if config is None:
            return 0, 0, 0, 0, self.max_participants, 0
        return (
            config.max_completed,
            config.max_concurrent or 0,
            config.max_operations,
            config.feed_bytes,
            config.max_participants,
            config.store_wait_ms,
        )

    @staticmethod
    def from_capacities(words: tuple[int, ...]) -> Layout:
        """The layout of a segment whose header holds `words`; `ConfigInvalid` if none has them."""
        completed, concurrent, operations, feed_bytes, participants, store_wait_ms = words
        if not (completed or operations or feed_bytes):
            return Layout(None)
        return Layout(
            OpsLifecycleConfig(
                max_completed=completed,
                max_concurrent=concurrent or None,
                max_operations=operations,
                feed_bytes=feed_bytes,
                max_participants=participants,
                store_wait_ms=store_wait_ms,
            )
        )

    def slot(self, index: int) -> int:
        """The offset of an operation slot."""
        return self.slots_at + index * SLOT_SIZE

    def fingerprint(self, index: int) -> int:
        """The offset of a slot's word in the fingerprint column."""
        return self.fingerprints + index * WORD

    @staticmethod
    def cursor(index: int) -> int:
        """The offset of a cursor."""
        return CURSORS_AT + index * LINE

    @staticmethod
    def participant(index: int) -> int:
        """The offset of a participant slot."""
        return PARTICIPANTS_AT + index * PARTICIPANT_SIZE


def _aligned(offset: int, to: int) -> int:
    return -(-offset // to) * to
