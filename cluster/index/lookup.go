package index

import (
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// Kind says where an extent's bytes are. Values are stored.
type Kind uint8

const (
	// KindLocal is in a segment of this disk.
	KindLocal Kind = 0
	// KindZero reads as zeros and has no bytes.
	KindZero Kind = 1
	// KindCold is in a cold object.
	KindCold Kind = 2
)

// Place says where the bytes of a run are.
type Place struct {
	Kind Kind
	// At is the first block's place (KindLocal).
	At seglog.Location
	// Framed bytes are one stored unit of up to 16 blocks that is decoded as a
	// whole; the run begins Skip blocks into it. Cold extents always are.
	Framed bool
	Skip   uint8
	Codec  uint8
	Key    block.KeyID
	Stored uint32 // bytes
	// Object is the number of the cold object in the chunk's record, and Offset
	// the frame's first byte in it (KindCold).
	Object, Offset uint32
}

// Query asks for Count blocks of one chunk (1..1024, not beyond its end).
type Query struct {
	Volume     block.VolumeID
	Generation block.Generation // of the view; GenerationLatest
	Chunk      block.Chunk
	Block      block.Index
	Count      uint16
}

// Run is a run of blocks that come from consecutive blocks of one extent, or
// that have none.
type Run struct {
	Block block.Index
	Count uint16
	State block.ExtentState
	// The rest is of data: where it is, one CRC per block, and the command that
	// wrote it.
	Place      Place
	CRCs       []uint32
	Generation block.Generation
	Written    block.Version
}

// Lookup is one read of the index. It is of one view: the state at the applied
// index at which it was made, whenever the rest of it is loaded (R1).
//
//	l := r.Lookup(q)
//	if l.Pending() { loop.Do(DiskRead, func() { err = l.Load() }, use) } else { use() }
//	... l.Runs() ...
//	l.Release()
type Lookup struct{}

// Lookup answers from memory as far as it can: completely if the delta or the
// chunk's version say everything, as for recent writes, for trimmed and for
// never-written chunks. A volume that is unknown or deleted reads as a hole.
func (r *Replica) Lookup(q Query) *Lookup { panic("draft") }

// Applied is the index that the look-up is of.
func (l *Lookup) Applied() block.Version { panic("draft") }

// Pending tells whether the store has to be asked.
func (l *Lookup) Pending() bool { panic("draft") }

// Load asks the store. It blocks and may be called off the Loop.
func (l *Lookup) Load() error { panic("draft") }

// Runs returns the runs, in order, that cover exactly what was asked. They are
// valid until Release. Blocks of it that are still pending have no run.
func (l *Lookup) Runs() []Run { panic("draft") }

// Release ends the use, on the Loop. Load must not be running.
func (l *Lookup) Release() { panic("draft") }

// MapQuery asks which blocks of the chunks [From, To) of the group hold data.
type MapQuery struct {
	Volume     block.VolumeID
	Generation block.Generation
	From, To   block.Chunk
	// Max is about how many runs to return; a chunk is never cut, so that a
	// little more may come.
	Max int
}

// Mapping is the answer to a MapQuery, used like a Lookup.
type Mapping struct{}

// Map starts a mapping.
func (r *Replica) Map(q MapQuery) *Mapping { panic("draft") }

// Applied is the index that the mapping is of.
func (m *Mapping) Applied() block.Version { panic("draft") }

// Pending tells whether the store has to be asked.
func (m *Mapping) Pending() bool { panic("draft") }

// Load asks the store. It blocks and may be called off the Loop.
func (m *Mapping) Load() error { panic("draft") }

// Runs returns the runs of data and of zero extents, in order. What is not in
// them, below Covered, is a hole; range markers count as holes.
func (m *Mapping) Runs() []wire.Run { panic("draft") }

// Covered is the chunk at which to go on; To when nothing is left.
func (m *Mapping) Covered() block.Chunk { panic("draft") }

// Release ends the use, on the Loop.
func (m *Mapping) Release() { panic("draft") }
