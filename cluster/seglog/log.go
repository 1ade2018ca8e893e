package seglog

import (
	"fmt"
	"slices"
	"sync"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/vfs"
)

// Options are what Open needs beside the folder.
type Options struct {
	// CapacityBytes bounds the segments together; what is above the last whole
	// segment is not used. At least 8 segments.
	CapacityBytes int64
	// Applied tells the durably applied entry of a replica, as the index that
	// was opened before has it; ok is false if it does not know the replica. It
	// decides what is rot (L2, L4) and where a log that was lost goes on (L6).
	Applied func(ReplicaKey) (EntryID, bool)
	// Live tells whether the durable index may point into a generation of a
	// segment (0: any). It is asked at open only, when the head of a segment cannot
	// be read or no segment is free otherwise; nil is yes.
	Live func(SegmentID, uint64) bool
	// Known are the replicas of the index. With any, the log was in use before: one
	// without a state table is of kind Corrupt then, and not begun anew. One that a
	// rotten log does not know is damaged (L4).
	Known []ReplicaKey
	// Parallel is how many goroutines read the disk while it opens, and for one
	// ReadEach; 0 and 1: none but the caller's, in an order that replays.
	Parallel int
	// Failed, if set, is called on the Loop once when the disk fails (L8). The
	// disk is marked by then.
	Failed func(error)
	// Logf, if set, takes what a person should know: damage and failures.
	Logf func(format string, args ...any)
}

// Log is the log of one disk.
//
// Time stands in batches: each has a number, that of the next is w.number. At
// most one batch is being written, so a batch's header can say that all earlier
// ones are durable, and at most one batch is torn by a crash.
//
// Invariants, between turns:
//   - an entry that is laid out (slot.segment != 0) and not in the batch in
//     flight is durable, and its segment has a claim for it;
//   - a claim ends only after the write that ended it is durable;
//   - a segment is opened anew only when it is empty (no claims, nothing live,
//     all its batches older than the newest state table) and no pin holds it;
//   - mu is held to change what Read and ReadBlocks look at: replicas' slots,
//     the list of segments and their files.
type Log struct {
	fs    vfs.FS
	dir   string
	sb    Superblock
	opt   Options
	loop  loop.Loop
	owner Owner

	maxSegments int
	mu          sync.RWMutex
	segs        []*segment // segs[i] has id i+1
	// What Space would have to look at every segment for:
	counts      [numStates]int         // of segs, by state
	claimed     map[SegmentID]*segment // with claims
	claimBlocks int64                  // of all
	looks       int                    // segments opened or sealed since all were looked at
	replicas    map[ReplicaKey]*Replica
	order       []*Replica // by key
	shut        bool       // the files are closed
	kept        kept       // nil once all replicas were opened

	w     writer
	gc    collector
	pins  pins
	idle  idler
	space struct {
		reused  int64
		full    bool // the file system refused a new segment: none is tried
		refused bool // it did, and has taken none since
	}
	stats   Stats
	damaged []Damage
	err     error // why the disk failed
}

// Err returns why the disk failed or was closed, nil while it works.
func (l *Log) Err() error { return l.err }

// Damaged lists replicas that recovery found damaged, in order of their keys.
func (l *Log) Damaged() []Damage { return l.damaged }

// Stats returns what was counted since open.
func (l *Log) Stats() Stats { return l.stats }

// Replicas returns the keys of all replicas on the disk, in order.
func (l *Log) Replicas() []ReplicaKey {
	keys := make([]ReplicaKey, len(l.order))
	for i, r := range l.order {
		keys[i] = r.key
	}
	return keys
}

// Replica returns a replica's log, nil if it is not on the disk.
func (l *Log) Replica(key ReplicaKey) *Replica { return l.replicas[key] }

// Start ties the log to its loop and to the index, whose live bits are loaded.
// Before, only what reads memory may be called. A nil owner points at nothing.
func (l *Log) Start(lp loop.Loop, owner Owner) {
	l.loop, l.owner = lp, owner
	l.reap()
	l.rest()
}

// Create makes a replica whose log begins after truncated. done as in Append.
// Creating a replica that exists is a broken invariant of the caller (C1), and
// so are more than MaxReplicas on a disk.
func (l *Log) Create(key ReplicaKey, truncated EntryID, hard HardState, done func(error)) *Replica {
	if l.replicas[key] != nil {
		panic(fmt.Sprintf("seglog: replica %v is created twice", key))
	}
	if len(l.order) == MaxReplicas {
		panic(fmt.Sprintf("seglog: replica %v is one too many", key))
	}
	r := &Replica{log: l, key: key, trunc: truncated, hard: hard, durable: truncated.Index}
	if l.refused(done) {
		return r
	}
	l.addReplica(r)
	l.enqueue(&write{r: r, flags: sectionCreate, trunc: truncated, hasTrunc: true, hard: hard, hasHard: true, done: done})
	return r
}

func (l *Log) addReplica(r *Replica) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.replicas[r.key] = r
	i, _ := slices.BinarySearchFunc(l.order, r.key, func(r *Replica, k ReplicaKey) int { return r.key.Compare(k) })
	l.order = slices.Insert(l.order, i, r)
}

func (l *Log) dropReplica(r *Replica) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.replicas, r.key)
	if i := slices.Index(l.order, r); i >= 0 {
		l.order = slices.Delete(l.order, i, i+1)
	}
}

// Remove forgets a replica and its log. What the index points at stays live
// until the index lets go of it. done as in Append.
func (l *Log) Remove(key ReplicaKey, done func(error)) {
	if l.refused(done) {
		return
	}
	r := l.replicas[key]
	if r == nil {
		l.loop.Post(func() { done(nil) })
		return
	}
	q := &write{r: r, flags: sectionRemove, done: done}
	l.mu.Lock()
	q.ends = r.cutFrom(r.FirstIndex(), nil)
	r.removed = true
	l.mu.Unlock()
	l.dropReplica(r)
	l.enqueue(q)
}

// refused answers a write to a log that failed or is closed.
func (l *Log) refused(done func(error)) bool {
	if l.err == nil && l.w.closing == nil {
		return false
	}
	err := l.err
	if err == nil {
		err = l.closedError()
	}
	l.loop.Post(func() { done(err) })
	return true
}

// Close refuses further writes, waits for what is queued, and closes the files.
// done is called on the Loop.
func (l *Log) Close(done func(error)) {
	if l.w.closing != nil {
		return
	}
	l.w.closing = done
	l.pumpLater()
	l.collect()
}

// closeFiles ends a closed log, once nothing is in flight.
func (l *Log) closeFiles() {
	done := l.w.closing
	l.w.closed = true
	err := l.err
	var files []vfs.File
	l.mu.Lock()
	l.shut = true
	for _, s := range l.segs {
		if s.file != nil {
			files = append(files, s.file)
			s.file = nil
		}
	}
	l.mu.Unlock()
	if l.err == nil {
		l.err = l.closedError()
	}
	l.loop.Do(loop.DiskWrite, func() {
		for _, f := range files {
			if cerr := f.Close(); err == nil {
				err = cerr
			}
		}
	}, func() { done(err) })
}

// fail makes err final for the disk: nothing that was not answered will be
// answered well, and the disk is marked so that no restart uses it (L8).
func (l *Log) fail(err error) {
	if l.err != nil {
		return
	}
	l.err = block.Wrap(block.Unavailable, err, "disk %v failed", l.sb.Disk)
	l.logf("%v", l.err)
	queue := l.w.queue
	l.w.queue = nil
	// The batch that is being written keeps its buffers until the disk is done.
	writing := l.w.round.move
	moves := slices.DeleteFunc(l.w.moves, func(m *moveBatch) bool { return m == writing })
	l.w.moves = nil
	var mark error
	l.loop.Do(loop.DiskWrite, func() { mark = MarkFailed(l.fs, l.dir, l.sb, err.Error()) }, func() {
		if mark != nil {
			l.logf("disk %v cannot be marked failed: %v", l.sb.Disk, mark)
		}
		for _, q := range queue {
			q.releasePayloads(q.next, len(q.entries))
			q.done(l.err)
		}
		for _, m := range moves {
			m.done(l.err)
		}
		if l.opt.Failed != nil {
			l.opt.Failed(l.err)
		}
		l.collect()
		l.pump()
	})
}

func (l *Log) logf(format string, args ...any) {
	if l.opt.Logf != nil {
		l.opt.Logf(format, args...)
	}
}
