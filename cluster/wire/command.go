// Package wire is the language of the cluster: the envelope of a replicated
// command (Entry.Data of a Raft entry) and the requests and responses between
// gateway and node. Pure codecs over little-endian bytes; decoders never panic
// and allocate nothing by a length they have not checked. Byte pictures are in
// docs/protocol/cluster.md.
package wire

import (
	"firn.io/firn/internal/block"
)

// CommandType says what apply does. Values are part of the log format. A
// replica that meets an unknown type halts with a message (S6).
type CommandType uint8

const (
	// CmdWrite stores payload at (Chunk, Block), 1..256 blocks of one chunk.
	CmdWrite CommandType = 1
	// CmdZero makes Count blocks from (Chunk, Block) zero: zero extents. No payload.
	CmdZero CommandType = 2
	// CmdMark is a range marker: all blocks of the chunks [Chunk, ToChunk) that
	// this group holds read as zero (S3). Trim, write-zeroes and shrink.
	CmdMark CommandType = 3
	// CmdFence installs an attachment (F2). It carries Size, Settings, VolumeValue.
	CmdFence CommandType = 4
	// CmdDelete makes the volume a tombstone and marks all of its chunks.
	CmdDelete CommandType = 5
	// CmdResize sets Size under the settings counter; VolumeValue as in CmdFence.
	CmdResize CommandType = 6
	// CmdFeature raises the group's feature level to Feature.
	CmdFeature CommandType = 7
)

// PayloadID names a payload in the whole cluster: the replica that proposed
// it, that process's incarnation, and a counter.
type PayloadID struct {
	Replica     uint64
	Incarnation uint64
	Counter     uint64
}

// EnvelopeVersion is the version of the command format that this build writes.
const EnvelopeVersion = 1

// Command is the decoded envelope. Which fields count depends on Type; the
// others are zero. Everything that apply decides on is in here or in the
// replicated state.
type Command struct {
	Type    CommandType
	Flags   uint16 // FlagXxx
	Cluster block.ClusterID
	Volume  block.VolumeID

	Epoch      block.Epoch
	Nonce      block.Nonce
	Generation block.Generation
	Layout     block.LayoutVersion

	// OpSeq and Floor are W3's. Fence, Delete and Feature carry OpSeq 0: they
	// are idempotent by themselves.
	OpSeq block.OpSeq
	Floor block.OpSeq

	Chunk   block.Chunk
	ToChunk block.Chunk // CmdMark: exclusive
	Block   block.Index
	Count   uint16 // blocks

	Payload      PayloadID // set by the leader that proposes
	PayloadBytes uint32    // stored length; Count*4096 for codec 0
	Codec        uint8     // 0 raw
	KeyID        block.KeyID
	CRCs         []uint32 // one per block of the payload

	Size        int64 // CmdFence, CmdResize: bytes
	Settings    block.SettingsCounter
	VolumeValue []byte // the volume's etcd value (S8), at most MaxVolumeValueBytes
	Feature     uint32
}

// FlagReadOnlyVolume in CmdFence and CmdResize keeps writes out at apply while
// the volume is set read-only.
const FlagReadOnlyVolume uint16 = 1 << 0

// OpWindow is how far above its floor an opSeq may be (W3).
const OpWindow = 4096

// MaxVolumeValueBytes bounds the copy of a volume's etcd value in a command.
const MaxVolumeValueBytes = 128 << 10

// Outcome is what apply made of a command. Values travel and are stored in
// W3's window.
type Outcome uint8

const (
	// OutcomeApplied: the command took effect (now or, for a repeated one, then).
	OutcomeApplied Outcome = 1
	// OutcomeBelowFloor: opSeq was below the floor; no effect. Ends nothing for
	// the sender of the current floor: it had its answer already.
	OutcomeBelowFloor Outcome = 2
	// OutcomeOldEpoch: a newer epoch, or another nonce of the same epoch, is
	// installed. Ends nothing (W4): the sender is fenced or must fence anew.
	OutcomeOldEpoch Outcome = 3
	// OutcomeBeyondWindow: opSeq >= floor + 4096. Ends nothing.
	OutcomeBeyondWindow Outcome = 4
	// The refusals below end an operation; they are remembered in the window.
	OutcomeOutOfRange    Outcome = 5 // a block at or beyond the record's size
	OutcomeNoVolume      Outcome = 6 // unknown or a tombstone
	OutcomeOldGeneration Outcome = 7
	OutcomeReadOnly      Outcome = 8
	OutcomeInvalid       Outcome = 9 // a command that does not make sense; a bug of its sender
)

// Definite tells whether the outcome ends an operation (W4).
func (o Outcome) Definite() bool {
	switch o {
	case OutcomeApplied, OutcomeOutOfRange, OutcomeNoVolume, OutcomeOldGeneration, OutcomeReadOnly, OutcomeInvalid:
		return true
	}
	return false
}

// ApplyResult is the answer of apply to one command.
type ApplyResult struct {
	Outcome Outcome
	// Version of this entry, or of the entry that first carried a repeated opSeq
	// as far as known (else of this one).
	Version block.Version
	// For CmdFence, CmdDelete and CmdResize: the record after the command, and
	// the epoch and nonce that a fence replaced.
	Record        VolumeRecord
	ReplacedEpoch block.Epoch
	ReplacedNonce block.Nonce
}

// VolumeRecord is the part of a group's volume record that travels.
type VolumeRecord struct {
	Volume      block.VolumeID
	Epoch       block.Epoch
	Nonce       block.Nonce
	Generation  block.Generation
	Size        int64
	Settings    block.SettingsCounter
	ReadOnly    bool
	Tombstone   bool
	VolumeValue []byte
}
