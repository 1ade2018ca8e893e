// Package node is one storage process: the replicas on its disks, the requests
// that gateways send it, and the work in the background that keeps its disks in
// order. It ties seglog (the log of a disk), index (the replicated state) and
// raftgroup (consensus) together; each of them knows nothing of the others.
//
// A Node is a single-threaded core on its Loop. Open, which recovers the disks,
// blocks and runs before the Loop is used; everything after Start runs on the
// Loop. Blocking work (reads of disks, merges, calls to the metadata store) goes
// through the Loop's Do.
//
// What holds:
//   - A replica opens only after the metadata store was told that it exists (C1).
//   - A read is answered from one pinned view whose applied index is at or above
//     the read's token, and says which (R1).
//   - The log of a replica is truncated only up to what a flushed checkpoint
//     holds (L7); as long as the logs of the disk are within their cap, not what
//     a follower still needs. One that needs more is filled from chunk tables.
//   - A replica whose state is a mixture of two is in no group and serves
//     nothing (C3).
//   - A disk whose sync failed takes no part in anything any more, now and after
//     a restart (L8).
package node

import (
	"cmp"
	"context"
	"slices"
	"time"

	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/raftgroup"
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/cluster/transport"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/vfs"
)

// DiskConfig is one disk of a node.
type DiskConfig struct {
	// Dir is the folder that the disk is mounted at. An empty one is formatted.
	Dir string
	// CapacityBytes is how much of it Firn may fill: what watermarks count from.
	// 0 is what it has and what is free in the file system, but for a part that
	// the index and others need.
	CapacityBytes int64
	// Sharing is how many disks share the file system, if CapacityBytes is 0.
	// 0 counts as 1.
	Sharing int
}

// Config is what a node is made of. All fields without "optional" must be set.
type Config struct {
	ID      block.NodeID
	Cluster block.ClusterID
	// Listen is the address to serve on; Advertise (optional) the one that
	// others reach it at, if that differs from the bound one.
	Listen, Advertise string
	Zone              string // optional
	// Boot is the machine's boot id, for the liveness key.
	Boot  string
	Disks []DiskConfig

	FS vfs.FS
	// OpenStore opens the store of a disk's index in dir, which exists.
	OpenStore func(dir string) (index.Store, error)
	Network   transport.Network
	Meta      meta.Store
	Loop      loop.Loop
	// DiskLoop makes the Loop with pools of its own that a disk's blocking work
	// runs on, so that a disk that hangs does not hold up the others. Nil: Loop.
	DiskLoop func() loop.Loop
	// Incarnation differs from that of every earlier process of this node.
	Incarnation uint64
	// Created is the date that a disk is formatted with, for people. Optional.
	Created string
	// NewDiskID names a disk that is formatted: random, or from a seed.
	NewDiskID func() block.DiskID

	// Parallel is how many goroutines read a disk while it opens, and for one
	// request of blocks that lie apart; 0 and 1: one, in an order that replays.
	Parallel int

	Limits raftgroup.Limits // optional
	Pace   Pace             // optional
	// Logf takes what a person should know. Optional.
	Logf func(format string, args ...any)
}

// Pace says when the work in the background is done. A zero field takes its
// value from DefaultPace.
type Pace struct {
	// SegmentBytes is the size of the segments of a disk that is formatted.
	SegmentBytes int64
	// LogBytes bounds what the logs of a disk may claim before its replicas are
	// checkpointed to truncate them. 0: 5 % of the disk, at most 64 GiB.
	LogBytes int64
	// CheckpointUpdates is the number of updates in memory, per disk, that
	// starts checkpoints.
	CheckpointUpdates int
	// CheckpointBytes is how much the log of a disk takes between checkpoints:
	// a start after a crash reads its headers and applies it again.
	CheckpointBytes int64
	// CheckpointAge bounds the age of an update that is not checkpointed.
	CheckpointAge time.Duration
	// CopyBytes is how much data per second a node sends at most to replicas that
	// are filled from its own (C3), so that clients keep the rest of the disks.
	CopyBytes int64
	// Upkeep is how often all this is looked at.
	Upkeep time.Duration
}

// DefaultPace suits disks of hundreds of gigabytes.
var DefaultPace = Pace{
	SegmentBytes:      64 << 20,
	CheckpointUpdates: 1 << 20,
	CheckpointBytes:   1 << 30,
	CheckpointAge:     60 * time.Second,
	CopyBytes:         128 << 20,
	Upkeep:            200 * time.Millisecond,
}

// The cap of the logs of a disk (section 4.1 of the architecture).
const (
	logPercent  = 5
	maxLogBytes = 64 << 30
	minLogBytes = 64 << 20
)

// Node is one storage process. See the package for its rules.
type Node struct {
	cfg  Config
	loop loop.Loop
	host *raftgroup.Host

	ctx    context.Context // bounds calls to the metadata store and connections
	cancel context.CancelFunc

	disks    []*disk // in the order of the configuration
	replicas map[block.GroupID]*replica
	// retired are replicas beside those: replaced ones whose data was not removed
	// yet, and new ones that wait for the seat of one. They do nothing.
	retired map[seglog.ReplicaKey]*replica

	peers    *peers
	orders   *orders
	space    *space
	views    *views
	installs *installs
	register registration
	session  *meta.Session
	nodes    *meta.Mirror
	groups   *meta.Mirror

	addr       string // that others reach this node at
	stopListen func()
	senders    map[transport.Peer]block.NodeID // of accepted connections

	reads     int
	readBytes int64
	loading   int    // reads that are on a disk now
	loaded    func() // if set, is called when none is any more
	counters  Counters

	stopping bool // no new work begins
	stopped  bool // nothing is done any more
}

// Open recovers the disks: it formats empty ones, takes their locks, reads their
// logs and opens their indexes. It blocks and does not use the Loop. A disk that
// is marked failed, or fails now, is left out, with its reason in Status; Open
// fails when a disk is in use by another process (kind Busy), belongs to another
// cluster or node (Denied), or when no disk is usable.
func Open(ctx context.Context, cfg Config) (*Node, error) {
	if cfg.Logf == nil {
		cfg.Logf = func(string, ...any) {}
	}
	if len(cfg.Disks) == 0 {
		return nil, block.Errorf(block.Invalid, "node %d has no disks", cfg.ID)
	}
	p := &cfg.Pace
	p.SegmentBytes = cmp.Or(p.SegmentBytes, DefaultPace.SegmentBytes)
	p.CheckpointUpdates = cmp.Or(p.CheckpointUpdates, DefaultPace.CheckpointUpdates)
	p.CheckpointBytes = cmp.Or(p.CheckpointBytes, DefaultPace.CheckpointBytes)
	p.CheckpointAge = cmp.Or(p.CheckpointAge, DefaultPace.CheckpointAge)
	p.Upkeep = cmp.Or(p.Upkeep, DefaultPace.Upkeep)
	p.CopyBytes = cmp.Or(p.CopyBytes, DefaultPace.CopyBytes)

	if cfg.DiskLoop == nil {
		cfg.DiskLoop = func() loop.Loop { return cfg.Loop }
	}
	n := &Node{cfg: cfg, loop: cfg.Loop, replicas: make(map[block.GroupID]*replica),
		retired: make(map[seglog.ReplicaKey]*replica), senders: make(map[transport.Peer]block.NodeID)}
	n.peers, n.orders, n.space = newPeers(n), newOrders(n), newSpace(n)
	n.views, n.installs = newViews(n), newInstalls(n)
	n.register.node = n
	usable := 0
	var first error
	for _, dc := range cfg.Disks {
		d, err := openDisk(n, dc)
		if err != nil {
			n.abandonDisks()
			return nil, err
		}
		n.disks = append(n.disks, d)
		if d.failed == nil {
			usable++
		} else {
			first = cmp.Or(first, d.failed)
		}
	}
	if usable == 0 {
		n.abandonDisks()
		return nil, block.Wrap(block.Unavailable, first, "node %d: no usable disk", cfg.ID)
	}
	n.ctx, n.cancel = context.WithCancel(ctx)
	return n, nil
}

// Start begins to serve: it listens, opens the replicas that the disks hold,
// registers the node and follows the orders of the metadata store. It is called
// on the Loop. After an error the node is closed.
func (n *Node) Start() error {
	n.host = raftgroup.NewHost(raftgroup.Config{
		Node: n.cfg.ID, Loop: n.loop, Sender: n.peers, Incarnation: n.cfg.Incarnation, Limits: n.cfg.Limits, Logf: n.cfg.Logf,
	})
	bound, stop, err := n.cfg.Network.Listen(n.ctx, n.cfg.Listen, n)
	if err != nil {
		n.cancel()
		n.stopping, n.stopped = true, true
		n.abandonDisks()
		return err
	}
	n.addr, n.stopListen = cmp.Or(n.cfg.Advertise, bound), stop
	n.host.Start()
	for _, d := range n.disks {
		d.start()
	}
	n.session = meta.NewSession(n.loop, n.cfg.Meta, meta.NodeTTL, n.register.granted, nil)
	n.nodes = meta.NewMirror(n.loop, n.cfg.Meta, meta.NodesPrefix, n.peers.changed, nil)
	n.groups = meta.NewMirror(n.loop, n.cfg.Meta, meta.GroupsPrefix, n.orders.changed, n.orders.synced)
	n.session.Start(n.ctx)
	n.nodes.Start(n.ctx)
	n.groups.Start(n.ctx)
	n.space.tick()
	n.loop.After(n.cfg.Pace.Upkeep, n.upkeep)
	return nil
}

// Addr is the address that others reach the node at; set by Start.
func (n *Node) Addr() string { return n.addr }

// ID is the node's id.
func (n *Node) ID() block.NodeID { return n.cfg.ID }

// Stop ends the node in order: leadership moves to others, what is in memory is
// checkpointed, disks are closed, the lease is given back. done is called on the
// Loop. It may be called once, after Start has succeeded.
func (n *Node) Stop(done func(error)) {
	n.stopping = true
	n.installs.stopAll()
	n.views.endAll()
	n.nodes.Stop()
	n.groups.Stop()
	n.host.Drain(func() {
		n.checkpointAll(func(err error) {
			n.stopListen()
			n.host.Stop()
			n.peers.close()
			n.session.Stop(func(error) {
				n.stopped = true
				n.cancel()
				n.loaded = func() { n.closeDisks(err, done) }
				if n.loading == 0 {
					n.loaded()
				}
			})
		})
	})
}

func (n *Node) closeDisks(err error, done func(error)) {
	waiting := len(n.disks)
	for _, d := range n.disks {
		d.close(func(cerr error) {
			err = cmp.Or(err, cerr)
			if waiting--; waiting == 0 {
				done(err)
			}
		})
	}
}

// abandonDisks gives the disks' locks and stores back after a start that failed.
func (n *Node) abandonDisks() {
	for _, d := range n.disks {
		if err := d.abandon(); err != nil {
			n.logf("disk %v in %s: %v", d.id, d.cfg.Dir, err)
		}
	}
}

func (n *Node) diskOf(id block.DiskID) *disk {
	for _, d := range n.disks {
		if d.id == id {
			return d
		}
	}
	return nil
}

func (n *Node) logf(format string, args ...any) { n.cfg.Logf(format, args...) }

// addReplica makes a replica known that a disk holds. Of two of one group the
// one that is not damaged has the seat, then the newer: the older was replaced.
// The metadata store may know better (orders.seat).
func (n *Node) addReplica(rep *replica) {
	was := n.replicas[rep.key.Group]
	switch {
	case was == nil:
		n.replicas[rep.key.Group] = rep
		return
	case was.damaged() == rep.damaged() && was.key.Replica < rep.key.Replica, was.damaged() && !rep.damaged():
		n.sit(rep)
	default:
		n.retired[rep.key] = rep
		was, rep = rep, was
	}
	n.logf("group %d: replica %d on disk %v stays closed beside replica %d", rep.key.Group, was.key.Replica, was.disk.id, rep.key.Replica)
}

// held returns a replica that this node holds, closed or not.
func (n *Node) held(key seglog.ReplicaKey) *replica {
	if rep := n.replicas[key.Group]; rep != nil && rep.key == key {
		return rep
	}
	return n.retired[key]
}

// opening tells whether a retired replica of the group is about to open.
func (n *Node) opening(g block.GroupID) bool {
	for key, rep := range n.retired {
		if key.Group == g && rep.opening {
			return true
		}
	}
	return false
}

// sit makes rep the replica of its group that may open.
func (n *Node) sit(rep *replica) {
	if was := n.replicas[rep.key.Group]; was != nil && was != rep {
		was.retire()
	}
	delete(n.retired, rep.key)
	n.replicas[rep.key.Group] = rep
}

// sorted returns the replicas in the order of their groups.
func (n *Node) sorted() []*replica {
	out := make([]*replica, 0, len(n.replicas))
	for _, id := range sortedKeys(n.replicas) {
		out = append(out, n.replicas[id])
	}
	return out
}

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return sortedFunc(m, cmp.Compare) }

func sortedFunc[K comparable, V any](m map[K]V, compare func(a, b K) int) []K {
	keys := make([]K, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, compare)
	return keys
}
