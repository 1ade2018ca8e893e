package raftgroup

import (
	"slices"
	"time"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
)

// The pace of Raft (C4).
const (
	// Tick is the unit of Raft's time-outs.
	Tick = 50 * time.Millisecond
	// HeartbeatTicks is how often a leader makes itself heard.
	HeartbeatTicks = 2
	// ElectionTicks without a leader start an election, within a random factor
	// of one to two.
	ElectionTicks = 10
	// SlowDiskTicks is how long a write to the log may take before the leaders
	// of that disk move away (L8).
	SlowDiskTicks = 10
	// silentTicks is how long a node may leave appends unanswered before what
	// was sent to it counts as lost.
	silentTicks = 20
)

// Limits are the byte budgets of a host. Raft's own limits count headers only.
type Limits struct {
	// ProposedBytes bounds payload and data of proposals that have not ended.
	ProposedBytes int64
	// RetainedBytes bounds payload of durable entries kept in memory for
	// followers a little behind.
	RetainedBytes int64
	// InflightBytes bounds what is sent to one node and not acknowledged. One
	// message is always allowed.
	InflightBytes int64
	// WindowBytes bounds what one read of the log for a lagging follower
	// brings; WindowsBytes bounds all of them in memory.
	WindowBytes  int
	WindowsBytes int64
}

// DefaultLimits suit a node of a few disks.
var DefaultLimits = Limits{
	ProposedBytes: 128 << 20,
	RetainedBytes: 64 << 20,
	InflightBytes: 32 << 20,
	WindowBytes:   4 << 20,
	WindowsBytes:  64 << 20,
}

// Raft's own limits, in bytes of entry data (headers), not of payload.
const (
	maxAppendHeaders      = 64 << 10
	maxUncommittedHeaders = 64 << 20
	maxApplyHeaders       = 1 << 20
	maxInflightAppends    = 256
)

// Config is what a host is made of.
type Config struct {
	Node   block.NodeID
	Loop   loop.Loop
	Sender Sender
	// Incarnation tells the payload ids of this process from those of earlier
	// ones. Random, or a counter that never repeats.
	Incarnation uint64
	// Limits; a zero field takes its value from DefaultLimits.
	Limits Limits
	// Logf, if set, takes what Raft has to say: rare and for people.
	Logf func(format string, args ...any)
}

// Host drives all groups of a node. Its methods are called on the Loop.
type Host struct {
	cfg    Config
	loop   loop.Loop
	limits Limits

	groups map[block.GroupID]*Group
	order  []*Group // by group id
	disks  []*disk
	lanes  []*lane // by node id

	opening  map[block.GroupID]bool
	dirty    []*Group
	answers  []answer
	spare    []answer // the array of the last flush's answers, for reuse
	deferred bool     // a flush is due at the end of this turn
	ticks    uint64
	timer    loop.Timer

	counter   uint64 // of payload ids
	reads     uint64 // ids of ReadIndex batches
	proposed  int64
	retained  retention
	windowed  int64
	windows   []*window // oldest first
	draining  bool
	drainDone func()
	drainEnd  uint64
	counters  Counters
	command   wire.Command // decoded for apply, one at a time
	check     wire.Command // decoded for Propose
}

// Counters count since the host began.
type Counters struct {
	Proposals, Dropped, Busy uint64
	Applied                  uint64
	Appends                  uint64 // writes to logs
	MessagesIn, MessagesOut  uint64
	MessagesBad              uint64 // did not decode, or for a replica that is not here
	Heartbeats               uint64 // messages, each of many groups
	Offers                   uint64 // to followers that the log no longer reaches
	WindowReads              uint64 // reads of the log for followers
	ReadErrors               uint64
	SlowDiskTicks            uint64 // ticks at which a disk was found slow
}

// disk watches the oldest write to one disk that has not returned.
type disk struct {
	id     block.DiskID
	writes []uint64 // the ticks at which writes in flight began
}

// NewHost returns a host without groups. Start it before opening any.
func NewHost(cfg Config) *Host {
	l := cfg.Limits
	d := DefaultLimits
	for _, f := range []struct{ have, or *int64 }{
		{&l.ProposedBytes, &d.ProposedBytes}, {&l.RetainedBytes, &d.RetainedBytes},
		{&l.InflightBytes, &d.InflightBytes}, {&l.WindowsBytes, &d.WindowsBytes},
	} {
		if *f.have == 0 {
			*f.have = *f.or
		}
	}
	if l.WindowBytes == 0 {
		l.WindowBytes = d.WindowBytes
	}
	if cfg.Logf == nil {
		cfg.Logf = func(string, ...any) {}
	}
	return &Host{cfg: cfg, loop: cfg.Loop, limits: l, groups: make(map[block.GroupID]*Group), opening: make(map[block.GroupID]bool)}
}

// Start begins to tick.
func (h *Host) Start() {
	if h.timer == nil {
		h.timer = h.loop.After(Tick, h.tick)
	}
}

// Stop closes all groups and ends the ticks. It does not wait for writes in
// flight; their effects are those of a crash.
func (h *Host) Stop() {
	if h.timer != nil {
		h.timer.Stop()
	}
	for _, g := range slices.Clone(h.order) {
		g.Close()
	}
	for _, l := range h.lanes {
		l.beats = nil
	}
}

// Drain moves leadership of all groups to other nodes, as far as a follower is
// able to take it, then calls done: at the latest after two election time-outs.
// It is for a planned stop; groups that get the lead back later are sent away
// again.
func (h *Host) Drain(done func()) {
	h.draining, h.drainDone, h.drainEnd = true, done, h.ticks+2*ElectionTicks
	h.drain()
}

func (h *Host) drain() {
	leading := false
	for _, g := range h.order {
		if g.Leading() && !g.conf.sole(g.cfg.Replica) {
			g.SendLeaderAway()
			leading = true
		}
	}
	if done := h.drainDone; done != nil && (!leading || h.ticks >= h.drainEnd) {
		h.drainDone = nil
		h.loop.Post(done)
	}
}

// Group returns the replica of a group on this node, nil if it is not open.
func (h *Host) Group(id block.GroupID) *Group { return h.groups[id] }

// Groups returns the open groups in the order of their ids. The slice is the
// host's; it is valid until a group is opened or closed.
func (h *Host) Groups() []*Group { return h.order }

// Counters returns the counts so far.
func (h *Host) Counters() Counters { return h.counters }

// RetainedBytes is the payload of durable entries that is kept in memory.
func (h *Host) RetainedBytes() int64 { return h.retained.bytes }

func (h *Host) tick() {
	h.timer = h.loop.After(Tick, h.tick)
	h.ticks++
	for _, g := range h.order {
		g.tick()
	}
	for _, d := range h.disks {
		h.watchDisk(d)
	}
	for _, l := range h.lanes {
		h.watchLane(l)
	}
	if h.draining {
		h.drain()
	}
}

// watchDisk sends the leaders of a disk away whose oldest write takes too long.
// Time counts in ticks of this loop, so that a pause of the whole process does
// not look like a slow disk.
func (h *Host) watchDisk(d *disk) {
	if len(d.writes) == 0 || h.ticks-d.writes[0] < SlowDiskTicks {
		return
	}
	h.counters.SlowDiskTicks++
	for _, g := range h.order {
		if g.disk == d && g.Leading() {
			g.SendLeaderAway()
		}
	}
}

func (h *Host) diskOf(id block.DiskID) *disk {
	for _, d := range h.disks {
		if d.id == id {
			return d
		}
	}
	d := &disk{id: id}
	h.disks = append(h.disks, d)
	return d
}

// mark puts g on the list of groups to flush at the end of the turn.
func (h *Host) mark(g *Group) {
	if g.dirty || g.failed != nil || g.raft == nil {
		return
	}
	g.dirty = true
	h.dirty = append(h.dirty, g)
	h.flushLater()
}

func (h *Host) flushLater() {
	if !h.deferred {
		h.deferred = true
		h.loop.Defer(h.flush)
	}
}

// flush drains the groups that something happened to in this turn, then sends
// the heartbeats that were gathered.
func (h *Host) flush() {
	for i := 0; i < len(h.dirty); i++ {
		g := h.dirty[i]
		h.dirty[i] = nil
		g.dirty = false
		g.flush()
	}
	h.dirty = h.dirty[:0]
	for _, l := range h.lanes {
		h.sendBeats(l)
	}
	h.evict()
	h.deferred = false
	// What is answered may ask for more: that makes another flush of this turn.
	answers := h.answers
	h.answers = h.spare[:0]
	for i := range answers {
		answers[i].give()
		answers[i] = answer{}
	}
	h.spare = answers
}

// answer is the end of a proposal or of a read, given at the end of a flush.
type answer struct {
	done   func(wire.ApplyResult, wire.Status)
	result wire.ApplyResult
	status wire.Status

	read  func(index uint64, ok bool)
	index uint64
	ok    bool
}

func (a *answer) give() {
	if a.done != nil {
		a.done(a.result, a.status)
	} else {
		a.read(a.index, a.ok)
	}
}

func (h *Host) answer(a answer) {
	h.answers = append(h.answers, a)
	h.flushLater()
}

// Receive takes a message of TypeRaft or TypeHeartbeat from another node.
func (h *Host) Receive(from block.NodeID, m transport.Message) {
	h.counters.MessagesIn++
	switch m.Type {
	case transport.TypeRaft:
		h.receiveRaft(from, m)
	case transport.TypeHeartbeat:
		h.receiveBeats(from, m)
		m.Release()
	default:
		h.counters.MessagesBad++
		m.Release()
	}
}

// Unreachable says that a connection to a node was lost, and with it maybe what
// was sent last.
func (h *Host) Unreachable(node block.NodeID) {
	l := h.laneOf(node)
	l.beats, l.beatCount = nil, 0
	for _, g := range h.order {
		g.unreachable(node)
	}
}

func (h *Host) add(g *Group) {
	h.groups[g.cfg.Group] = g
	i, _ := slices.BinarySearchFunc(h.order, g.cfg.Group, func(g *Group, id block.GroupID) int {
		switch {
		case g.cfg.Group < id:
			return -1
		case g.cfg.Group > id:
			return 1
		}
		return 0
	})
	h.order = slices.Insert(h.order, i, g)
}

func (h *Host) remove(g *Group) {
	delete(h.groups, g.cfg.Group)
	if i := slices.Index(h.order, g); i >= 0 {
		h.order = slices.Delete(h.order, i, i+1)
	}
}
