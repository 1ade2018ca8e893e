package index

import (
	"bytes"
	"slices"

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
	store    Store
	opts     Options
	replicas map[seglog.ReplicaKey]*Replica
	lastID   localID
	live     liveBits
	snap     *sharedSnapshot
	merged   []*merged // finished and not known to be durable
	free     []*Lookup
}

// merged is a job's change of the store that waits for a flush.
type merged struct {
	replica *Replica
	applied uint64
	dead    holds
}

// sharedSnapshot is a view of the store that look-ups and jobs share. Counted
// on the Loop only.
type sharedSnapshot struct {
	Snapshot
	refs int
}

// Close lets go of the store's snapshots. Jobs and look-ups must have ended.
// The store stays open; what was not flushed is left to the log.
func (db *DB) Close() error {
	if db.snap.refs != 1 {
		return block.Errorf(block.Internal, "index: closed with %d look-ups or jobs in flight", db.snap.refs-1)
	}
	return db.release(db.snap)
}

func (db *DB) acquire() *sharedSnapshot {
	db.snap.refs++
	return db.snap
}

func (db *DB) release(s *sharedSnapshot) error {
	if s.refs--; s.refs == 0 {
		return s.Snapshot.Close()
	}
	return nil
}

// refresh makes later look-ups see what was committed.
func (db *DB) refresh() {
	old := db.snap
	db.snap = &sharedSnapshot{Snapshot: db.store.Snapshot(), refs: 1}
	if old != nil {
		db.release(old)
	}
}

// Create adds a replica. It is in memory only until its first checkpoint is
// flushed: DurablyApplied is 0 up to then. Kind Exists.
func (db *DB) Create(key seglog.ReplicaKey, c Creation) (*Replica, error) {
	if db.replicas[key] != nil {
		return nil, block.Errorf(block.Exists, "replica %d of group %d is on this disk already", key.Replica, key.Group)
	}
	db.lastID++
	r := newReplica(db, key, db.lastID, groupRecord{
		applied: c.Index, term: c.Term, era: c.Era, conf: bytes.Clone(c.Conf),
	})
	db.replicas[key] = r
	return r, nil
}

// Replica returns a replica of this disk, nil if it is not here.
func (db *DB) Replica(key seglog.ReplicaKey) *Replica { return db.replicas[key] }

// Replicas returns all replicas in the order of group and replica id.
func (db *DB) Replicas() []*Replica {
	all := make([]*Replica, 0, len(db.replicas))
	for _, r := range db.replicas {
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b *Replica) int { return a.key.Compare(b.key) })
	return all
}

// StartFlush returns a job that makes everything durable that was committed
// before it: Replica.DurablyApplied rises and segments become idle when it is
// finished. Its Run returns only once the store has flushed or failed. After an
// error of kind NoSpace a later flush makes up for it.
func (db *DB) StartFlush() *Job {
	now := db.merged
	db.merged = nil
	return &Job{
		run: db.store.Flush,
		finish: func() {
			for _, m := range now {
				db.live.release(m.dead)
				m.replica.durable = max(m.replica.durable, m.applied)
			}
		},
		failed: func() { db.merged = append(now, db.merged...) },
	}
}

// LiveBlocks is how many blocks of a segment the index may point at: what the
// last durable checkpoints, memory and the checkpoints in flight refer to. A
// segment with 0 may be recycled as far as the index is concerned (L7).
func (db *DB) LiveBlocks(s seglog.SegmentID) int {
	if e := db.live.segments[s]; e != nil {
		return e.live + e.held
	}
	return 0
}

// Live tells whether the index points at block b of a segment.
func (db *DB) Live(s seglog.SegmentID, b uint16) bool {
	e := db.live.segments[s]
	return e != nil && e.bits.get(b, 1) != 0
}

// KeptTotal is the sum of LiveBlocks over all segments.
func (db *DB) KeptTotal() int64 { return db.live.total + db.live.held }

// LiveTotal is how many blocks of the disk are live.
func (db *DB) LiveTotal() int64 { return db.live.total }

// Job is blocking work on the store. Run is called once, off the Loop (class
// Merge), and Finish once, on the Loop, after Run has returned.
type Job struct {
	run    func() error
	finish func()
	failed func() // may be nil; what to do instead of finish after an error
	err    error
}

// Run does the blocking part.
func (j *Job) Run() { j.err = j.run() }

// Finish takes the result over and returns Run's error, which is final for the
// disk (L8), but for one of kind NoSpace of a flush.
func (j *Job) Finish() error {
	switch {
	case j.err == nil:
		j.finish()
	case j.failed != nil:
		j.failed()
	}
	return j.err
}

func (db *DB) segmentGeneration(s seglog.SegmentID) uint64 {
	if db.opts.SegmentGeneration == nil {
		return 0
	}
	return db.opts.SegmentGeneration(s)
}
