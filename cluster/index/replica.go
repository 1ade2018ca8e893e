package index

import (
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// Apply applies a command whose payload, if it has one, lies at loc in the log
// of this disk. It is deterministic and changes memory only (S6). index is one
// above the last applied one. cmd and its slices are not kept.
//
// An error means that this build does not understand the command, or that
// entries were skipped: the replica has to halt.
func (r *Replica) Apply(index, term uint64, cmd *wire.Command, loc seglog.Location) (wire.ApplyResult, error) {
	panic("draft")
}

// ApplyEmpty notes an entry without effect.
func (r *Replica) ApplyEmpty(index, term uint64) error { panic("draft") }

// ApplyConf notes a change of members: its encoded result.
func (r *Replica) ApplyConf(index, term uint64, conf []byte) error { panic("draft") }

// Record returns the group's record of a volume. The caller must not change
// its VolumeValue.
func (r *Replica) Record(v block.VolumeID) (wire.VolumeRecord, bool) { panic("draft") }

// Volumes returns the volumes that the group knows, tombstones included, in
// the order of their ids.
func (r *Replica) Volumes() []block.VolumeID { panic("draft") }

// ChunkVersion is the version of a chunk (S4); false if the volume is unknown.
func (r *Replica) ChunkVersion(v block.VolumeID, c block.Chunk) (block.Version, bool) { panic("draft") }

// Usage is about how many bytes of this disk hold data of the volume: exact
// after a checkpoint, above it what was overwritten since is counted twice.
// Zeros, index and log count nothing; what trims hide counts until it is reaped.
func (r *Replica) Usage(v block.VolumeID) int64 { panic("draft") }

// Pending says what a checkpoint would merge.
type Pending struct {
	// Updates counts the extents and markers added to the delta since it began.
	Updates int
	// Bytes is about the memory of the delta and of the one being merged.
	Bytes int64
	// Entries is how many entries were applied since the last checkpoint began.
	Entries uint64
	// Markers are range markers that wait to be reaped.
	Markers int
	// Busy says that a job of the replica is in flight.
	Busy bool
}

// Pending is what the node decides on when to checkpoint and to reap.
func (r *Replica) Pending() Pending { panic("draft") }

// StartCheckpoint freezes the state at Applied and returns the job that merges
// it into the store. It is durable once a flush that was started after Finish
// is finished. Nil if nothing was applied since the last one, or if a job of
// this replica is in flight.
func (r *Replica) StartCheckpoint() *Job { panic("draft") }

// StartReap returns a job that removes up to about extents records that range
// markers or deletions hide, and in time the markers themselves (S3). Nil if
// there is nothing to reap, if a job of this replica is in flight, or if the
// markers are not in a checkpoint yet.
func (r *Replica) StartReap(extents int) *Job { panic("draft") }

// Move says that the bytes of Count blocks, which the extent (Volume, Chunk,
// Block.., Generation, Written) has at From, are synced at To as well. A move
// never changes what a view sees.
type Move struct {
	Volume     block.VolumeID
	Chunk      block.Chunk
	Block      block.Index
	Count      uint16
	Generation block.Generation
	Written    block.Version
	CRCs       []uint32
	From, To   seglog.Location
}

// ApplyMoves repoints those blocks whose live bit is set at From, and calls
// done with how many there were: at once, or when the job of this replica that
// is in flight has finished, since a merge may be about to clear that bit.
//
// From's segment must not be recycled before done. Moves are not repeated by
// recovery: until the checkpoint that holds it is durable, the segment of From
// is not idle, and afterwards nothing needs the move.
func (r *Replica) ApplyMoves(moves []Move, done func(repointed int)) { panic("draft") }

// Digest is a checksum of what can be seen: all volume records with their
// windows, and for each block the data that the newest or a retained view sees
// (generation, written, CRC). Equal applied indexes have equal digests on all
// replicas, whenever they made their checkpoints. It reads the store and blocks.
func (r *Replica) Digest() (uint64, error) { panic("draft") }
