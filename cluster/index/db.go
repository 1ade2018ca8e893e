package index

import (
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/internal/block"
)

// Options are what a DB needs to know of the world.
type Options struct {
	// SegmentGeneration tells how often a segment was recycled; live bits that
	// were saved under another generation are void (S9). Called on the Loop, and
	// by Open. Nil means that segments are never recycled.
	SegmentGeneration func(seglog.SegmentID) uint64
}

// DB is the index of one disk. Except for Open, which reads the store, its
// methods are called on the Loop and touch memory only.
type DB struct {
	store Store
}

// Open reads what a store holds: everything that stays in memory (volume and
// group records, range markers, chunk versions, live bits). It blocks, before
// the Loop runs. Kinds Corrupt, Unsupported, and what the store fails with.
func Open(store Store, opts Options) (*DB, error) { panic("draft") }

// Close lets go of the store's snapshots. Jobs and look-ups must have ended.
// The store stays open; what was not flushed is left to the log.
func (db *DB) Close() error { panic("draft") }

// Creation is the state that a new replica begins with. All replicas of a
// group are created with the same one but for their ids.
type Creation struct {
	// Index and Term of the entry that the log begins after.
	Index, Term uint64
	// Conf is the encoded membership, opaque here; the counter of replica ids
	// is in it.
	Conf []byte
	// Era goes into every Version.
	Era uint16
}

// Create adds a replica. It is in memory only until its first checkpoint is
// flushed: DurablyApplied is 0 up to then. Kind Exists.
func (db *DB) Create(key seglog.ReplicaKey, c Creation) (*Replica, error) { panic("draft") }

// Replica returns a replica of this disk, nil if it is not here.
func (db *DB) Replica(key seglog.ReplicaKey) *Replica { panic("draft") }

// Replicas returns all replicas in the order of group and replica id.
func (db *DB) Replicas() []*Replica { panic("draft") }

// StartRemove forgets a replica at once and returns the job that removes it
// from the store. Its segments are idle after the next flush. A job of the
// replica must not be in flight.
func (db *DB) StartRemove(key seglog.ReplicaKey) *Job { panic("draft") }

// StartFlush returns a job that makes everything durable that was committed
// before it: Replica.DurablyApplied rises and segments become idle when it is
// finished. Its Run returns only once the store has flushed or failed.
func (db *DB) StartFlush() *Job { panic("draft") }

// LiveBlocks is how many blocks of a segment the index points at.
func (db *DB) LiveBlocks(s seglog.SegmentID) int { panic("draft") }

// AppendLive appends a copy of the segment's live bits to dst: bit i%64 of word
// i/64 says that block i is pointed at. Words past the last live block may be
// missing.
func (db *DB) AppendLive(dst []uint64, s seglog.SegmentID) []uint64 { panic("draft") }

// Idle tells whether neither the last durable checkpoints nor any delta point
// into the segment (L7).
func (db *DB) Idle(s seglog.SegmentID) bool { panic("draft") }

// LiveTotal is how many blocks of the disk are pointed at.
func (db *DB) LiveTotal() int64 { panic("draft") }

// Job is blocking work on the store. Run is called once, off the Loop (class
// Merge), and Finish once, on the Loop, after Run has returned.
type Job struct {
	run    func() error
	finish func()
	err    error
}

// Run does the blocking part.
func (j *Job) Run() { j.err = j.run() }

// Finish takes the result over and returns Run's error, which is final for the
// disk (L8).
func (j *Job) Finish() error {
	if j.err == nil {
		j.finish()
	}
	return j.err
}

// Replica is the replicated state of one replica.
type Replica struct {
	db  *DB
	key seglog.ReplicaKey
}

// Key names the replica.
func (r *Replica) Key() seglog.ReplicaKey { return r.key }

// Applied is the last applied index and its term.
func (r *Replica) Applied() (index, term uint64) { panic("draft") }

// AppliedVersion is Applied under the replica's era: what a token is compared to.
func (r *Replica) AppliedVersion() block.Version { panic("draft") }

// DurablyApplied is the index of the last durable checkpoint, 0 before the first.
func (r *Replica) DurablyApplied() uint64 { panic("draft") }

// Conf is what ApplyConf or Create gave last. The caller must not change it.
func (r *Replica) Conf() []byte { panic("draft") }

// Era of the replica's versions.
func (r *Replica) Era() uint16 { panic("draft") }

// Feature is the group's feature level.
func (r *Replica) Feature() uint32 { panic("draft") }
