package node

import (
	"cmp"
	"io"
	"path"
	"slices"

	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/raftgroup"
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/vfs"
)

// indexFolder is where a disk's index store lives, beside the log's folder.
const indexFolder = "index"

// disk is one disk: its log, its index, and the replicas that it holds.
type disk struct {
	node *Node
	loop loop.Loop // the node's, with pools of its own for this disk
	cfg  DiskConfig
	id   block.DiskID
	sb   seglog.Superblock

	lock  io.Closer
	store index.Store
	index *index.DB
	log   *seglog.Log

	// failed is why the disk takes part in nothing any more (L8).
	failed error
	// corrupt counts what failed its checksums since the node was opened.
	corrupt uint64

	settled   bool  // no replica opens any more
	saved     int64 // bytes that the log had taken when the newest checkpoint began
	busy      bool  // a chain of jobs of the index runs
	needFlush bool  // the reaper has changed the store since the last flush
	needSpace bool  // the log asked for free segments
	births    []birth
	// quarantine lists replicas that never open again.
	quarantine quarantined
	ticks      int // of upkeep, since the last checkpoint for want of space
}

// openDisk makes a disk ready: locked, formatted if it is new, its log and
// index recovered. A disk that failed before, or does now, comes back with
// failed set; an error is one that the operator has to resolve first.
func openDisk(n *Node, cfg DiskConfig) (*disk, error) {
	d := &disk{node: n, loop: n.cfg.DiskLoop(), cfg: cfg}
	lock, err := vfs.Lock(n.cfg.FS, cfg.Dir)
	if err != nil {
		return nil, err
	}
	d.lock = lock
	if err := d.identify(); err != nil {
		return nil, cmp.Or(err, lock.Close())
	}
	if d.failed == nil {
		if err := d.recover(); err != nil {
			n.logf("disk %v in %s cannot be used: %v", d.id, cfg.Dir, err)
			d.failed = err
		}
	}
	return d, nil
}

// identify reads the superblock, or formats an empty folder.
func (d *disk) identify() error {
	n, fs, dir := d.node, d.node.cfg.FS, d.cfg.Dir
	sb, err := seglog.Load(fs, dir)
	if err != nil && block.KindOf(err) == block.NotFound {
		if err := mustBeEmpty(fs, dir); err != nil {
			return err
		}
		sb = seglog.Superblock{Cluster: n.cfg.Cluster, Disk: n.cfg.NewDiskID(), Node: n.cfg.ID, SegmentBytes: n.cfg.Pace.SegmentBytes, Created: n.cfg.Created}
		err = seglog.Format(fs, dir, sb)
	}
	switch {
	case err != nil:
		return err
	case sb.Cluster != n.cfg.Cluster:
		return block.Errorf(block.Denied, "%s is a disk of cluster %v, this is cluster %v: give another folder, or the right metadata store", dir, sb.Cluster, n.cfg.Cluster)
	case sb.Node != n.cfg.ID:
		return block.Errorf(block.Denied, "%s is a disk of node %d, this is node %d: start it with --id %d, or give this node another folder with --disk; a folder that never held data of the cluster can be emptied and used", dir, sb.Node, n.cfg.ID, sb.Node)
	}
	d.sb, d.id = sb, sb.Disk
	reason, failed, err := seglog.FailedReason(fs, dir, sb)
	if failed {
		d.failed = block.Errorf(block.Unavailable, "disk %v failed before: %s; replace it", d.id, reason)
	}
	return err
}

// mustBeEmpty refuses to format a folder that holds something else.
func mustBeEmpty(fs vfs.FS, dir string) error {
	names, err := fs.List(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if name != vfs.LockName && name != "lost+found" && !vfs.IsTemp(name) {
			return block.Errorf(block.Denied, "%s is not empty and not a disk of Firn (it holds %q): give an empty folder", dir, name)
		}
	}
	return nil
}

// recover opens index and log. What the log lost, or kept beyond what the index
// holds, is put right when the replicas open (L6).
//
// The index is not told of segment generations: a segment is opened anew only
// after no durable checkpoint points into it (L7), so saved live bits of an
// older generation do not exist.
func (d *disk) recover() error {
	n := d.node
	dir := path.Join(d.cfg.Dir, indexFolder)
	err := n.cfg.FS.MkdirAll(dir)
	if err != nil {
		return err
	}
	if d.store, err = n.cfg.OpenStore(dir); err != nil {
		if d.store, err = d.remakeStore(dir, err); err != nil {
			return err
		}
	}
	if d.index, err = index.Open(d.store, index.Options{}); err != nil {
		return err
	}
	if d.cfg.CapacityBytes == 0 {
		if d.cfg.CapacityBytes, err = d.fillable(); err != nil {
			return err
		}
	}
	d.log, err = seglog.Open(n.cfg.FS, d.cfg.Dir, d.sb, seglog.Options{
		CapacityBytes: d.cfg.CapacityBytes,
		Applied: func(key seglog.ReplicaKey) (seglog.EntryID, bool) {
			state := d.index.Replica(key)
			if state == nil {
				return seglog.EntryID{}, false
			}
			index, term := state.Applied()
			return seglog.EntryID{Index: index, Term: term}, true
		},
		Live:     func(s seglog.SegmentID, _ uint64) bool { return d.index.LiveBlocks(s) > 0 },
		Parallel: n.cfg.Parallel, Failed: d.fail,
		Logf: n.cfg.Logf,
	})
	if err != nil {
		return err
	}
	if err := d.quarantine.load(n.cfg.FS, d.cfg.Dir); err != nil {
		n.logf("disk %v in %s: %v", d.id, d.cfg.Dir, err)
	}
	damaged := make(map[seglog.ReplicaKey]string)
	for _, dm := range d.log.Damaged() {
		damaged[dm.Key] = dm.Reason
	}
	for _, state := range d.index.Replicas() {
		if d.log.Replica(state.Key()) == nil {
			continue // its creation was not finished: the order is carried out again
		}
		rep := newReplica(d, state)
		if why, bad := damaged[rep.key]; bad {
			rep.halted = block.Errorf(block.Corrupt, "its log is damaged: %s", why)
		} else if why, bad := d.quarantine.list[rep.key]; bad {
			rep.halted = block.Errorf(block.Corrupt, "it is in quarantine: %s", why)
		}
		n.addReplica(rep)
	}
	return nil
}

// remakeStore makes the index anew that could not be opened, if the disk's log
// was never begun: a crash while the index was made for the first time may leave
// one that does not open, and it has held nothing.
func (d *disk) remakeStore(dir string, why error) (index.Store, error) {
	fs := d.node.cfg.FS
	held, err := seglog.FileBytes(fs, d.cfg.Dir, d.sb)
	if err != nil || held > 0 {
		return nil, why
	}
	d.node.logf("disk %v in %s was never used, and the making of its index was cut short (%v): it is made anew", d.id, d.cfg.Dir, why)
	if err := fs.RemoveAll(dir); err != nil {
		return nil, err
	}
	if err := fs.MkdirAll(dir); err != nil {
		return nil, err
	}
	return d.node.cfg.OpenStore(dir)
}

// What the log leaves free in a file system whose size it was not told: a full
// one stops the index and, in one process with it, the metadata store.
const (
	spareBytes   = 4 << 30
	sparePercent = 10 // at most
)

// fillable is what the log's segments take already, and the disk's share of
// what is free besides.
func (d *disk) fillable() (int64, error) {
	fs := d.node.cfg.FS
	sp, err := fs.Space(d.cfg.Dir)
	if err != nil {
		return 0, err
	}
	held, err := seglog.FileBytes(fs, d.cfg.Dir, d.sb)
	if err != nil {
		return 0, err
	}
	spare := min(spareBytes, sp.TotalBytes*sparePercent/100)
	held += max(0, sp.FreeBytes-spare) / int64(max(1, d.cfg.Sharing))
	// What is there must stay readable even if others have taken the rest.
	return max(held, min(sp.TotalBytes, seglog.MinBytes(d.sb))), nil
}

// start begins to write and opens the replicas that were open before.
func (d *disk) start() {
	if d.failed != nil {
		return
	}
	d.log.Start(d.loop, owner{d})
	d.saved = -d.log.Space().ClaimedBytes // what an earlier process has left
	for _, rep := range d.replicas() {
		if rep.wasOpen() {
			rep.open()
		}
	}
}

// replicas returns those of this disk, in the order of groups.
func (d *disk) replicas() []*replica {
	var out []*replica
	for _, rep := range d.node.sorted() {
		if rep.disk == d {
			out = append(out, rep)
		}
	}
	return out
}

// held returns all replicas that the disk holds, retired ones too, in the order
// of group and id: their states are checkpointed and reaped, since collection
// moves their blocks like those of others.
func (d *disk) held() []*replica {
	out := d.replicas()
	for _, rep := range d.node.retired {
		if rep.disk == d {
			out = append(out, rep)
		}
	}
	slices.SortFunc(out, func(a, b *replica) int { return a.key.Compare(b.key) })
	return out
}

// birth is a replica that is being created.
type birth struct {
	rep  *replica
	done func(*replica, error)
}

// create makes a replica durable: its state in the index first, then its
// identity in the log. A replica that is in the index only is not one yet.
// Those that are asked for at about the same time share one flush.
//
// The log may know the replica although the index does not: the index was lost
// after an earlier process had carried out the order. If the log says that the
// replica has never been open, it has promised nothing, and what is missing is
// made; otherwise it is lost (C1), with kind Corrupt.
func (d *disk) create(group block.GroupID, id block.ReplicaID, era uint16, conf []byte, done func(*replica, error)) {
	key := seglog.ReplicaKey{Group: group, Replica: id}
	state := d.index.Replica(key)
	if state == nil {
		if l := d.log.Replica(key); l != nil && !isBlank(l) {
			done(nil, block.Errorf(block.Corrupt, "replica %v has been open, and its state is not on disk %v any more", key, d.id))
			return
		}
		var err error
		state, err = d.index.Create(key, index.Creation{Index: raftgroup.InitialIndex, Term: raftgroup.InitialTerm, Conf: conf, Era: era})
		if err != nil {
			done(nil, err)
			return
		}
	}
	d.births = append(d.births, birth{newReplica(d, state), done})
	if len(d.births) == 1 {
		d.node.loop.Defer(func() { d.whenIdle(d.bear) })
	}
}

// isBlank tells whether a replica's log is as it was born.
func isBlank(l *seglog.Replica) bool {
	return l.Damaged() == "" && l.HardState().Term <= raftgroup.InitialTerm && l.FirstIndex() == raftgroup.InitialIndex+1 && l.LastIndex() == raftgroup.InitialIndex
}

func (d *disk) bear() {
	births := d.births
	d.births = nil
	end := func(err error) {
		for _, b := range births {
			b.done(nil, err)
		}
	}
	if d.failed != nil {
		end(d.failed)
		return
	}
	reps := make([]*replica, len(births))
	for i, b := range births {
		reps[i] = b.rep
	}
	d.checkpoint(reps, func(err error) {
		if err != nil {
			end(err)
			return
		}
		for _, b := range births {
			if d.log.Replica(b.rep.key) != nil {
				b.done(b.rep, nil)
				continue
			}
			d.log.Create(b.rep.key, seglog.EntryID{Index: raftgroup.InitialIndex, Term: raftgroup.InitialTerm},
				seglog.HardState{Term: raftgroup.InitialTerm, Commit: raftgroup.InitialIndex}, func(err error) { b.done(b.rep, err) })
		}
	})
}

// fail takes the disk out, for good: its replicas leave their groups without a
// word, it is marked beside the disk and in the metadata store (L8).
func (d *disk) fail(err error) {
	if d.failed != nil {
		return
	}
	d.failed = err
	n := d.node
	n.logf("disk %v in %s failed and is out: %v", d.id, d.cfg.Dir, err)
	for _, rep := range d.held() {
		n.installs.stop(rep)
		rep.close()
		if n.replicas[rep.key.Group] == rep {
			delete(n.replicas, rep.key.Group)
		}
		delete(n.retired, rep.key)
	}
	fs, dir, sb, reason := n.cfg.FS, d.cfg.Dir, d.sb, err.Error()
	var marked error
	d.loop.Do(loop.DiskWrite, func() { marked = seglog.MarkFailed(fs, dir, sb, reason) }, func() {
		if marked != nil {
			n.logf("disk %v: mark it as failed: %v", d.id, marked)
		}
	})
	n.register.update()
}

// close ends the disk, once nothing is in flight on it any more.
func (d *disk) close(done func(error)) {
	if d.log == nil {
		d.finishClose(nil, done)
		return
	}
	d.log.Close(func(err error) {
		if d.failed != nil {
			err = nil // said already
		}
		d.finishClose(err, done)
	})
}

func (d *disk) finishClose(err error, done func(error)) {
	d.loop.Do(loop.Merge, func() { err = cmp.Or(err, d.abandon()) }, func() { done(err) })
}

// abandon lets go of all but the log, whose files end with the process. It blocks.
func (d *disk) abandon() error {
	var first error
	if d.index != nil {
		first = cmp.Or(first, d.index.Close())
	}
	if d.store != nil {
		first = cmp.Or(first, d.store.Close())
	}
	return cmp.Or(first, d.lock.Close())
}

// size is what Firn may use.
func (d *disk) size() int64 {
	if d.log == nil {
		return d.cfg.CapacityBytes
	}
	return d.log.Space().TotalBytes
}

const (
	// openSegments are those that the log writes to: of fresh data and of survivors.
	openSegments = 2
	// reserveSegments never hold live data for good: the open ones, and two that
	// the log leaves to truncations and survivors.
	reserveSegments = openSegments + 2
)

// room is what live data and logs may fill. On a small disk it is much less
// than all; there, too, writes are refused before they would wait for segments
// that never become free.
func (d *disk) room() int64 {
	sp := d.log.Space()
	size := sp.TotalBytes
	if sp.Refused { // what others have taken of the file system is not there
		size = min(size, sp.FileBytes)
	}
	return size - reserveSegments*d.sb.SegmentBytes
}

// taken is what counts as full of room (S7). Segments that the log claims count
// whole: what is dead in them cannot be collected before they are truncated.
func (d *disk) taken() int64 {
	sp := d.log.Space()
	return max(sp.LiveBytes, sp.HeldBytes-openSegments*d.sb.SegmentBytes)
}

func (d *disk) logCap() int64 {
	return cmp.Or(d.node.cfg.Pace.LogBytes, max(minLogBytes, min(maxLogBytes, d.size()*logPercent/100)))
}

func (d *disk) status() DiskStatus {
	s := DiskStatus{ID: d.id, Dir: d.cfg.Dir, SizeBytes: d.size(), Health: d.health()}
	if d.failed != nil {
		s.Failed = d.failed.Error()
		return s
	}
	sp := d.log.Space()
	s.TakenBytes, s.LogBytes, s.LiveBytes = d.taken(), sp.ClaimedBytes, sp.LiveBytes
	s.Log = d.log.Stats()
	for _, rep := range d.replicas() {
		s.Replicas++
		s.Pending += rep.state.Pending().Updates
	}
	return s
}
