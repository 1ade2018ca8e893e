package node

import (
	"firn.io/firn/cluster/raftgroup"
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// Counters count since the node was opened.
type Counters struct {
	// Requests by kind, and answers by status.
	Requests [wire.ReqHealth + 1]uint64
	Answers  [wire.StatusNoVolume + 1]uint64
	// Unsent counts answers for peers that were gone or did not take them.
	Unsent uint64
	// BadMessages did not decode, or made no sense.
	BadMessages uint64
	// NoSpace counts writes refused for want of room.
	NoSpace uint64
	// ReadBytes and CorruptReads count bytes read for clients, and reads that
	// failed their checksums.
	ReadBytes, CorruptReads uint64
	// Checkpoints (of replicas), Flushes (of stores), Truncations (of logs), Moved
	// (runs of blocks, by collection) and Reaped (jobs of the reaper) count the
	// work in the background.
	Checkpoints, Flushes, Truncations, Moved, Reaped uint64
	// Removed counts replaced replicas whose data was removed.
	Removed uint64
	// Copies counts replicas that began to be filled from another one's state,
	// CopiesDone those that were, CopyFailures attempts that stopped. CopyViews
	// counts views that others read here. Bytes are of data.
	Copies, CopiesDone, CopyFailures, CopyViews, CopyBytesIn, CopyBytesOut uint64
}

func (c *Counters) answered(k wire.RequestKind, st wire.Status) {
	if int(k) < len(c.Requests) {
		c.Requests[k]++
	}
	if int(st) < len(c.Answers) {
		c.Answers[st]++
	}
}

// DiskStatus describes one disk.
type DiskStatus struct {
	ID  block.DiskID
	Dir string
	// Failed is why the disk takes no part, or empty.
	Failed string
	// Health is what the disk does with new writes, why, and what failed its
	// checksums.
	Health wire.DiskHealth
	// SizeBytes is what Firn may fill, TakenBytes what it has (S7), of which
	// LogBytes are claimed by logs and LiveBytes are data.
	SizeBytes, TakenBytes, LogBytes, LiveBytes int64
	// Log is what the disk's log has done since it was opened.
	Log seglog.Stats
	// Pending is the number of updates that no checkpoint holds yet.
	Pending  int
	Replicas int
}

// ReplicaStatus describes one replica.
type ReplicaStatus struct {
	Group   block.GroupID
	Replica block.ReplicaID
	Disk    block.DiskID
	// Open is false until the replica was recovered and acknowledged.
	Open bool
	// Failed is why it halted, or empty.
	Failed            string
	Leading           bool
	Leader            block.NodeID // 0: unknown
	Term              uint64
	Applied           uint64
	Committed         uint64
	DurablyApplied    uint64
	LogFirst, LogLast uint64
	// Copy is set while the replica is filled from another one's state, because
	// it is new or behind the log; then it is not open.
	Copy *CopyStatus
}

// Status is a snapshot of a node.
type Status struct {
	ID       block.NodeID
	Addr     string
	Zone     string
	Stopping bool
	// Registered says that the metadata store holds what is true of this node.
	Registered bool
	// Lease says that the liveness lease surely stands.
	Lease    bool
	Disks    []DiskStatus
	Replicas []ReplicaStatus // in the order of groups
	// Retired is how many replicas are here besides: replaced ones whose data is
	// still to be removed, and new ones that wait for the end of an older one.
	Retired int
	// Given is how many replicas the metadata store gives the node, and Missing how
	// many of them are not on its usable disks; GivenKnown that the store was asked.
	Given, Missing int
	GivenKnown     bool
	Counters       Counters
	Raft           raftgroup.Counters
}

// Leading returns the number of groups that the node leads.
func (s *Status) Leading() int {
	n := 0
	for _, r := range s.Replicas {
		if r.Leading {
			n++
		}
	}
	return n
}

// Status returns a snapshot. It is called on the Loop.
func (n *Node) Status() Status {
	s := Status{ID: n.cfg.ID, Addr: n.addr, Zone: n.cfg.Zone, Stopping: n.stopping, Registered: n.register.done, Retired: len(n.retired), Counters: n.counters}
	if n.host != nil {
		s.Lease, s.Raft, s.GivenKnown = n.session.Valid(), n.host.Counters(), n.groups.Ready()
	}
	s.Given, s.Missing = n.orders.given()
	for _, d := range n.disks {
		s.Disks = append(s.Disks, d.status())
	}
	for _, rep := range n.sorted() {
		s.Replicas = append(s.Replicas, rep.status())
	}
	return s
}

// Ready tells whether the node is registered, holds its lease and has opened
// every replica on its usable disks but those that are filled from others or
// have halted: Status tells of these.
func (n *Node) Ready() bool { return n.Unready() == nil }

// Unready is why the node is not Ready, or nil. Kind Unavailable; Busy if another
// process is this node.
func (n *Node) Unready() error {
	switch {
	case n.stopping || n.session == nil:
		return block.Errorf(block.Unavailable, "it is not running")
	case n.register.done && n.session.Valid():
	case n.session.Failing():
		return block.Wrap(block.Unavailable, n.session.Problem(), "it has no lease")
	case n.register.problem != nil:
		return block.Wrap(block.KindOf(n.register.problem), n.register.problem, "it is not registered")
	default:
		return block.Errorf(block.Unavailable, "it is not registered yet")
	}
	opening := 0
	for _, rep := range n.replicas {
		if rep.group == nil && rep.halted == nil && rep.disk.failed == nil && n.installs.all[rep.key.Group] == nil {
			opening++
		}
	}
	if opening > 0 {
		return block.Errorf(block.Unavailable, "%d of %d replicas are still being opened", opening, len(n.replicas))
	}
	return nil
}

// Leads tells whether this node leads the group, as far as it knows.
func (n *Node) Leads(id block.GroupID) bool {
	rep := n.replicas[id]
	return rep != nil && rep.group != nil && rep.group.Leading()
}
