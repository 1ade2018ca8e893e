package raftgroup

import (
	"errors"

	"go.etcd.io/raft/v3"
	pb "go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"

	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
)

// Group is one replica of a group.
//
// Invariants, at the end of each turn:
//   - the tail holds every entry above applied, and its payload unless it is
//     durable here and was evicted;
//   - a proposal in pending is an entry of the tail, of this term, that this
//     replica leads; when the lead is lost all of them end as dropped;
//   - apply runs in index order, each entry once, on entries durable here;
//   - nothing that Raft wants said after a write is said before the write's
//     done, and dones come in the order of the writes.
type Group struct {
	host *Host
	cfg  GroupConfig
	conf Conf
	disk *disk

	raft    *raft.RawNode // nil until recovered
	failed  error
	closed  bool
	dirty   bool
	applied EntryID
	commit  uint64
	hard    HardState // as Raft last gave it
	written HardState // as last queued for the log
	stable  uint64    // the last entry known durable here
	lead    block.ReplicaID
	role    raft.StateType
	// awayUntil is the tick until which a transfer of the lead is under way.
	awayUntil uint64
	changing  uint64 // the last entry that this leader proposed as a change of members
	slowest   uint64 // the lowest match of all members, from the leader

	tail   tail
	staged map[EntryID]held // received or proposed in this turn, not yet accepted by Raft

	writes []*write // on their way to the log, oldest first

	queue   []proposal // to be proposed at the end of the turn
	pending []proposal // entries of this term that this replica leads, by index

	reading   []read // asked for, waiting for Raft's answer
	confirmed []read // answered, waiting for apply
	askReads  []read // of this turn

	followers []*follower
	routes    map[block.ReplicaID]block.NodeID // of senders that the conf does not know
	windows   []*window
	loading   bool
	loadsFor  uint64 // the entry that Raft was told to be compacted because it is being read; 0: none
	readError error  // of the newest read of the log, for a follower
}

// proposal is a command on its way to apply.
type proposal struct {
	index   uint64
	data    []byte // the encoded command, until it is proposed
	payload *payload.Buf
	bytes   int64
	conf    bool // data is a change of members
	done    func(wire.ApplyResult, wire.Status)
}

// read is one ReadIndex. id is that of its batch.
type read struct {
	id    uint64
	index uint64
	done  func(index uint64, ok bool)
}

// ID returns the group's id.
func (g *Group) ID() block.GroupID { return g.cfg.Group }

// Replica returns this replica's id.
func (g *Group) Replica() block.ReplicaID { return g.cfg.Replica }

// Disk returns the disk that holds the replica.
func (g *Group) Disk() block.DiskID { return g.cfg.Disk }

// Conf returns the members as of the last applied entry.
func (g *Group) Conf() Conf { return g.conf }

// Applied returns the last applied entry.
func (g *Group) Applied() EntryID { return g.applied }

// Committed returns the highest index known to be committed.
func (g *Group) Committed() uint64 { return g.commit }

// Term returns the current term.
func (g *Group) Term() uint64 { return g.hard.Term }

// Err returns why the replica halted, or nil.
func (g *Group) Err() error { return g.failed }

// Leading tells whether this replica leads the group, as far as it knows.
func (g *Group) Leading() bool { return g.role == raft.StateLeader && g.failed == nil }

// Leader returns the leader that this replica knows of; ok is false if none.
func (g *Group) Leader() (node block.NodeID, replica block.ReplicaID, ok bool) {
	if g.lead == 0 || g.failed != nil {
		return 0, 0, false
	}
	node, ok = g.conf.NodeOf(g.lead)
	return node, g.lead, ok
}

// SlowestMatch is the highest index that all members hold durably, as leaders
// have told, or that was truncated regardless of those that did not. It
// never falls, though a new leader has to learn it again, and may have to from
// members whose disks are too full to answer before they have truncated.
// Truncation within the log's cap stays at or below it (L7).
func (g *Group) SlowestMatch() uint64 { return g.slowest }

// Progress is what a leader knows of one member.
type Progress struct {
	Member Member
	Match  uint64
	// Active says that it was heard within the last election time-out.
	Active bool
	// NeedsCopy says that the log no longer reaches back to what it needs: it is
	// filled from a view of the state (GroupConfig.Behind), then from the log.
	NeedsCopy bool
}

// Progress returns what the leader knows of the members, in their order; nil
// on other replicas.
func (g *Group) Progress() []Progress {
	if !g.Leading() {
		return nil
	}
	var ps []Progress
	first := g.cfg.Log.FirstIndex()
	g.raft.WithProgress(func(id uint64, _ raft.ProgressType, pr tracker.Progress) {
		p := Progress{Match: pr.Match, Active: pr.RecentActive,
			NeedsCopy: pr.State == tracker.StateSnapshot || pr.Match+1 < first && pr.Next < first}
		for _, m := range g.conf.Members {
			if uint64(m.Replica) == id {
				p.Member = m
			}
		}
		ps = append(ps, p)
	})
	return ps
}

// Propose replicates cmd with its payload (nil if it has none) and calls done
// exactly once, on the loop, after the turn:
//
//   - StatusOK with what apply made of exactly this entry;
//   - StatusNotLeader, StatusBusy, StatusInvalid (cmd does not decode, or p is
//     not what it says): refused, nothing was proposed;
//   - StatusDropped: the lead was lost or the replica halted or closed; the
//     command may or may not take effect (W4).
//
// Propose sets cmd.Payload and keeps nothing else of cmd. It takes over the
// caller's hold of p.
func (g *Group) Propose(cmd *wire.Command, p *payload.Buf, done func(wire.ApplyResult, wire.Status)) {
	h := g.host
	h.counter++
	cmd.Payload = wire.PayloadID{Replica: uint64(g.cfg.Replica), Incarnation: h.cfg.Incarnation, Counter: h.counter}
	pr := proposal{data: wire.AppendCommand(make([]byte, 0, commandBytes+len(cmd.VolumeValue)), cmd), payload: p, done: done}
	pr.bytes = entryOverhead + int64(len(pr.data)+payloadLen(p))
	_, n, _ := wire.PeekPayload(pr.data)
	switch {
	case wire.DecodeCommand(pr.data, &h.check) != nil || int(n) != payloadLen(p):
		// What does not decode would halt every replica when it is applied.
		g.refuse(pr, wire.StatusInvalid)
	case !g.Leading() || g.closed:
		g.refuse(pr, wire.StatusNotLeader)
	case h.proposed > 0 && h.proposed+pr.bytes > h.limits.ProposedBytes:
		g.refuse(pr, wire.StatusBusy)
	default:
		h.proposed += pr.bytes
		g.queue = append(g.queue, pr)
		h.mark(g)
	}
}

// commandBytes holds most encoded commands.
const commandBytes = 192

// entryOverhead is what an entry costs in memory besides its payload, roughly.
const entryOverhead = 512

func (g *Group) refuse(pr proposal, why wire.Status) {
	if pr.payload != nil {
		pr.payload.Release()
	}
	if why == wire.StatusBusy {
		g.host.counters.Busy++
	}
	g.host.answer(answer{done: pr.done, status: why})
}

// ReadIndex calls done on the loop with ok once this replica has applied all
// that was acknowledged before the call, as the leader confirmed by a majority
// after it; index is then applied here. ok is false when this replica does not
// lead or loses the lead meanwhile.
func (g *Group) ReadIndex(done func(index uint64, ok bool)) {
	if !g.Leading() || g.closed {
		g.host.answer(answer{read: done})
		return
	}
	g.askReads = append(g.askReads, read{done: done})
	g.host.mark(g)
}

// TransferLeader asks for the lead to move to a member. It is given up after an
// election time-out; meanwhile proposals are refused as busy.
func (g *Group) TransferLeader(to block.ReplicaID) {
	if g.Leading() {
		g.raft.TransferLeader(uint64(to))
		g.host.mark(g)
	}
}

// SendLeaderAway moves the lead to the voter that is most caught up among those
// heard lately. It returns false when there is none; then it is worth another
// try at the next tick, since who was heard is counted anew at each election
// time-out. Calls while a transfer is under way change nothing.
func (g *Group) SendLeaderAway() bool {
	if !g.Leading() {
		return false
	}
	if g.awayUntil > g.host.ticks {
		return true
	}
	var best uint64
	var match uint64
	g.raft.WithProgress(func(id uint64, typ raft.ProgressType, pr tracker.Progress) {
		if id != uint64(g.cfg.Replica) && typ == raft.ProgressTypePeer && pr.RecentActive && (best == 0 || pr.Match > match) {
			best, match = id, pr.Match
		}
	})
	if best == 0 {
		return false
	}
	g.awayUntil = g.host.ticks + ElectionTicks
	g.raft.TransferLeader(best)
	g.host.mark(g)
	return true
}

// Campaign asks for an election now, as if the leader had fallen silent.
func (g *Group) Campaign() {
	if g.raft != nil && g.failed == nil && !g.closed {
		if err := g.raft.Campaign(); err != nil {
			g.host.cfg.Logf("group %d: campaign: %v", g.cfg.Group, err)
		}
		g.host.mark(g)
	}
}

// Truncate forgets the log up to and including index, which must be durably
// applied here (L7; the caller knows). done, if not nil, is called once the
// truncation is durable.
func (g *Group) Truncate(index uint64, done func(error)) {
	if done == nil {
		done = func(error) {}
	}
	term, ok := g.term(index)
	if g.failed != nil || g.closed || !ok || index > g.applied.Index || index < g.cfg.Log.FirstIndex() {
		g.host.loop.Post(func() { done(g.failed) })
		return
	}
	g.append(LogWrite{Truncate: &EntryID{Index: index, Term: term}}, &write{done: done})
}

// Close ends the replica: proposals end as dropped, reads as not ok. Its log
// and state stay as they are.
func (g *Group) Close() {
	if g.closed {
		return
	}
	g.closed = true
	g.dropAll()
	g.release()
	g.host.remove(g)
}

// fail halts the replica.
func (g *Group) fail(err error) {
	if g.failed != nil || g.closed {
		return
	}
	g.failed = err
	g.host.cfg.Logf("group %d replica %d halted: %v", g.cfg.Group, g.cfg.Replica, err)
	g.dropAll()
	g.release()
	if g.cfg.Failed != nil {
		g.host.loop.Post(func() { g.cfg.Failed(g, err) })
	}
}

func (g *Group) dropAll() {
	queue := g.queue
	g.queue = nil
	for _, pr := range queue {
		g.host.proposed -= pr.bytes
		g.refuse(pr, wire.StatusDropped)
	}
	g.dropPending()
}

// dropPending ends everything that depended on being the leader.
func (g *Group) dropPending() {
	g.changing = 0
	pending := g.pending
	g.pending = nil
	for _, pr := range pending {
		g.end(pr, wire.ApplyResult{}, wire.StatusDropped)
	}
	for _, list := range []*[]read{&g.reading, &g.confirmed, &g.askReads} {
		reads := *list
		*list = nil
		for _, r := range reads {
			g.host.answer(answer{read: r.done})
		}
	}
	for _, f := range g.followers {
		g.forget(f)
	}
	g.followers = nil
}

// end answers a proposal that was proposed. Its payload belongs to the tail.
func (g *Group) end(pr proposal, res wire.ApplyResult, st wire.Status) {
	g.host.proposed -= pr.bytes
	if st == wire.StatusDropped {
		g.host.counters.Dropped++
	}
	g.host.answer(answer{done: pr.done, result: res, status: st})
}

func (g *Group) release() {
	for id, e := range g.staged {
		e.release()
		delete(g.staged, id)
	}
	g.tail.cut(g.tail.first)
	for _, w := range g.windows {
		g.host.dropWindow(w)
	}
	g.windows = nil
}

func (g *Group) tick() {
	if g.raft == nil || g.failed != nil {
		return
	}
	g.raft.Tick()
	g.watchOffers()
	g.leaveJoint()
	if g.raft.HasReady() {
		g.host.mark(g)
	}
}

// step gives Raft a message of another replica.
func (g *Group) step(m *pb.Message) {
	err := g.raft.Step(m)
	if err != nil && !errors.Is(err, raft.ErrProposalDropped) && !errors.Is(err, raft.ErrStepPeerNotFound) {
		g.host.cfg.Logf("group %d: %s from replica %d: %v", g.cfg.Group, m.GetType(), m.GetFrom(), err)
	}
	g.host.mark(g)
}
