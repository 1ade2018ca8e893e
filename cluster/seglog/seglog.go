// Package seglog is the disk of a node: one append-only log in recycled
// segments that is the Raft log of all replicas on the disk and the store of
// their data (rules L, docs/format/seglog.md). Payload is written once; what
// is worth keeping later is moved by garbage collection.
//
// A Log is a single-threaded core: after Start its methods are called on the
// Loop, except where they say otherwise.
package seglog

import (
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
)

// SegmentID numbers the segments of a disk, from 1. A segment's file is used
// again and again; each use is a generation.
type SegmentID uint32

// Location is where a payload begins: a 4 KiB block of a segment. It is local
// to a disk and never compared between replicas.
type Location struct {
	Segment SegmentID
	Block   uint16
}

// ReplicaKey names a replica. It is never used again after the replica is removed.
type ReplicaKey struct {
	Group   block.GroupID
	Replica block.ReplicaID
}

// Compare orders keys by group, then replica.
func (k ReplicaKey) Compare(o ReplicaKey) int {
	switch {
	case k.Group != o.Group:
		if k.Group < o.Group {
			return -1
		}
		return 1
	case k.Replica < o.Replica:
		return -1
	case k.Replica > o.Replica:
		return 1
	}
	return 0
}

// EntryID names one entry of a replica's log.
type EntryID struct {
	Index, Term uint64
}

// HardState is what Raft must not forget besides entries.
type HardState struct {
	Term, Vote, Commit uint64
}

// Limits of what is written.
const (
	// MaxDataBytes bounds Entry.Data.
	MaxDataBytes = 256 << 10
	// MaxReplicas bounds the replicas of a disk: what a state table can hold.
	MaxReplicas = 2000
	// MaxSegmentBytes is what a Location reaches.
	MaxSegmentBytes = 256 << 20
	// DefaultSegmentBytes suits disks.
	DefaultSegmentBytes = 64 << 20
)

// Entry is one entry of a Raft log.
type Entry struct {
	Term, Index uint64
	// Data is opaque to the log, at most MaxDataBytes.
	Data []byte
	// Payload is stored beside it, 4 KiB-aligned; nil when there is none. At
	// most block.MaxEntryBytes.
	Payload *payload.Buf
}

// Write is one write to a replica's log, atomic but for entries that do not fit
// one batch: then a prefix of them may survive a crash, without the rest of the
// Write. Nil and empty parts are absent.
type Write struct {
	// Entries are contiguous; the first one's index i discards all entries >= i
	// and is at most LastIndex+1.
	Entries []Entry
	// HardState is durable no earlier than Entries (L5).
	HardState *HardState
	// Truncate forgets all entries up to and including its index, before
	// Entries are appended. If the log ends below it or has another term there,
	// the whole log is emptied (L6). The caller keeps it at or below the durably
	// applied index (L7).
	Truncate *EntryID
}

// Record describes a run of blocks that the index points at: what a Move
// carries beside its payload.
type Record struct {
	Key        ReplicaKey
	Volume     block.VolumeID
	Chunk      block.Chunk
	Block      block.Index
	Generation block.Generation
	Written    block.Version
	CRCs       []uint32 // one per block
}

// Move says that collection has stored a record's blocks at To, durably; they
// were at From.
type Move struct {
	Record
	From, To Location
}

// Owner is what the log asks of the index that points into it. All methods are
// called on the Loop and read memory only.
type Owner interface {
	// LiveBlocks counts the blocks of a segment that the index may point at: what
	// the last durable checkpoints, memory or a frozen delta refer to. A segment
	// with 0 may be overwritten at once.
	LiveBlocks(seg SegmentID) int
	// LiveTotal is the sum of LiveBlocks over all segments.
	LiveTotal() int64
	// Live tells whether the index may point at block b of a segment.
	Live(seg SegmentID, b uint16) bool
	// Describe decodes the data of an entry with payload: which blocks it wrote.
	// ok is false for data that it does not know. CRCs are the index's own.
	Describe(key ReplicaKey, id EntryID, data []byte) (r Record, ok bool)
	// ApplyMoves points the index at To wherever it still points at From
	// (compare-and-set); what does not match is garbage at To. It never fails; what it
	// has to defer it keeps.
	ApplyMoves(moves []Move)
	// NeedSpace says that segments are short: a checkpoint, or a truncation,
	// may set some free. It may be called often.
	NeedSpace()
	// Damaged says that the blocks of a record failed their CRC when they were
	// to be moved. They stay where they are.
	Damaged(r Record, at Location)
}

// Space is how a disk's room is used, in bytes. Totals are of whole segments
// within the capacity.
type Space struct {
	TotalBytes   int64 // capacity
	FileBytes    int64 // taken from the file system
	LiveBytes    int64 // what the index points at
	ClaimedBytes int64 // payload of entries above the truncation; overlaps LiveBytes
	// HeldBytes is what collection cannot gain: segments with claims in whole,
	// and what is live in others.
	HeldBytes   int64
	FreeBytes   int64 // segments that can be written at once, or could be made
	ReusedBytes int64 // freed segments since open
	MovedBytes  int64 // payload that collection has copied since open
	Pins        int   // held
	// Refused: the file system had no room for the last segment that was to be
	// made. The log tries again by itself.
	Refused bool
}

// Stats counts since open.
type Stats struct {
	Batches, BatchBlocks, HeaderBlocks uint64
	Entries, PayloadBytes              uint64
	Moves, MoveBlocks                  uint64
	ZeroedBytes                        uint64
	Stalls                             uint64 // times that a write waited for a free segment
}

// Damage is a replica whose log cannot be trusted (L4): it must not vote again
// under its id.
type Damage struct {
	Key    ReplicaKey
	Reason string
}
