package raftgroup

import (
	"slices"

	"go.etcd.io/raft/v3"
	pb "go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
)

// lane is the way to one other node, shared by all groups: heartbeats of a turn
// travel in one message, and what is sent and not acknowledged has one budget.
type lane struct {
	node      block.NodeID
	beats     []byte
	beatCount int
	inflight  int64
	waiting   []*follower // held back by the budget, in the order they came
	heard     uint64      // the tick of the last acknowledgement, or of the first send after all was acknowledged
}

// follower is what a leader sends to one member, in order: an append waits for
// its payloads to be read and for the budget of the lane, and what comes behind
// it waits with it, for Raft would take a gap for a loss.
type follower struct {
	group   *Group
	replica block.ReplicaID
	lane    *lane
	queue   []*pb.Message
	sent    []sentAppend
	waiting bool // in lane.waiting
	// offered is the tick at which it was told that the log no longer reaches
	// back to it; 0 if it was not.
	offered uint64
}

type sentAppend struct {
	index uint64 // of the last entry
	bytes int64
}

func (h *Host) laneOf(node block.NodeID) *lane {
	i, ok := slices.BinarySearchFunc(h.lanes, node, func(l *lane, n block.NodeID) int { return int(int64(l.node) - int64(n)) })
	if !ok {
		h.lanes = slices.Insert(h.lanes, i, &lane{node: node})
	}
	return h.lanes[i]
}

func (g *Group) followerOf(replica block.ReplicaID) *follower {
	for _, f := range g.followers {
		if f.replica == replica {
			return f
		}
	}
	node, ok := g.conf.NodeOf(replica)
	if !ok {
		return nil
	}
	f := &follower{group: g, replica: replica, lane: g.host.laneOf(node)}
	g.followers = append(g.followers, f)
	return f
}

// send takes a message that Raft wants sent to another replica.
func (g *Group) send(m *pb.Message) {
	to := block.ReplicaID(m.GetTo())
	class := transport.Data
	switch m.GetType() {
	case pb.MsgHeartbeat, pb.MsgHeartbeatResp:
		if node, ok := g.nodeOf(to); ok {
			g.beat(g.host.laneOf(node), m)
		}
		return
	case pb.MsgApp:
		if f := g.followerOf(to); f != nil && g.Leading() {
			f.queue = append(f.queue, split(m)...)
			g.host.mark(g) // the flush pumps
		}
		return
	case pb.MsgVote, pb.MsgVoteResp, pb.MsgPreVote, pb.MsgPreVoteResp, pb.MsgTimeoutNow:
		class = transport.Control
	case pb.MsgAppResp:
	case pb.MsgSnap:
		g.offer(m)
		return
	default:
		// Forwarded proposals and reads are not used.
		return
	}
	if node, ok := g.nodeOf(to); ok {
		g.host.post(node, class, transport.Message{Type: transport.TypeRaft, Header: appendMessage(nil, g.cfg.Group, m)})
	}
}

// post sends m, which it takes over.
func (h *Host) post(node block.NodeID, c transport.Class, m transport.Message) bool {
	p := h.cfg.Sender.Peer(node)
	if p == nil {
		m.Release()
		return false
	}
	h.counters.MessagesOut++
	return p.Send(c, m)
}

// split cuts an append into messages that fit the transport's limits. Raft's
// limit on a message counts headers, not payload.
func split(m *pb.Message) []*pb.Message {
	ents := m.GetEntries()
	if len(ents) == 0 {
		return []*pb.Message{m}
	}
	var out []*pb.Message
	for len(ents) > 0 {
		n, header, bytes := 0, 0, 0
		for n < len(ents) && n < transport.MaxPayloads {
			d, p := len(ents[n].GetData())+entryEncodingOverhead, payloadBytes(ents[n])
			if n > 0 && (header+d > maxAppendHeaders || bytes+p > transport.MaxFrameBytes-maxAppendHeaders) {
				break
			}
			header, bytes, n = header+d, bytes+p, n+1
		}
		if n == len(ents) {
			return append(out, m)
		}
		var part *pb.Message
		part, m = cutAppend(m, n)
		out = append(out, part)
		ents = m.GetEntries()
	}
	return out
}

// cutAppend cuts an append after n of its entries.
func cutAppend(m *pb.Message, n int) (head, rest *pb.Message) {
	ents := m.GetEntries()
	index, term := ents[n-1].GetIndex(), ents[n-1].GetTerm()
	head = &pb.Message{
		Type: m.Type, To: m.To, From: m.From, Term: m.Term, Commit: m.Commit,
		Index: m.Index, LogTerm: m.LogTerm, Entries: ents[:n:n],
	}
	rest = &pb.Message{
		Type: m.Type, To: m.To, From: m.From, Term: m.Term, Commit: m.Commit,
		Index: &index, LogTerm: &term, Entries: ents[n:],
	}
	return head, rest
}

// pump sends what a follower's queue allows.
func (g *Group) pump(f *follower) {
	for len(f.queue) > 0 {
		m := f.queue[0]
		if m.GetTerm() != g.hard.Term || !g.Leading() {
			g.forget(f)
			return
		}
		payloads, bytes, have := g.payloadsOf(m.GetEntries())
		l := f.lane
		if have < len(m.GetEntries()) {
			missing := m.GetEntries()[have].GetIndex()
			if have == 0 {
				g.load(missing)
				return
			}
			// Send what is here: two followers must not evict each other's halves.
			head, rest := cutAppend(m, have)
			m = head
			f.queue[0] = rest
			f.queue = append([]*pb.Message{head}, f.queue...)
		}
		switch {
		case bytes > 0 && l.inflight > 0 && l.inflight+bytes > g.host.limits.InflightBytes:
			if !f.waiting {
				f.waiting = true
				l.waiting = append(l.waiting, f)
			}
			return
		}
		f.queue[0] = nil
		f.queue = f.queue[1:]
		for _, p := range payloads {
			p.Retain()
		}
		msg := transport.Message{Type: transport.TypeRaft, Header: appendMessage(nil, g.cfg.Group, m), Payloads: payloads}
		if n := len(m.GetEntries()); n > 0 {
			if l.inflight == 0 {
				l.heard = g.host.ticks
			}
			l.inflight += bytes
			f.sent = append(f.sent, sentAppend{index: m.GetEntries()[n-1].GetIndex(), bytes: bytes})
		}
		if !g.host.post(l.node, transport.Data, msg) {
			g.lost(f)
			return
		}
	}
}

// payloadsOf finds the payloads of an append's entries, and what they and the
// entries weigh, for as many entries from the front as are in memory. The holds
// stay those of tail and windows.
func (g *Group) payloadsOf(ents []*pb.Entry) (ps []*payload.Buf, bytes int64, have int) {
	for _, e := range ents {
		en := g.held(e)
		switch {
		case en != nil && en.complete():
			bytes += en.bytes()
			if en.payload != nil {
				ps = append(ps, en.payload)
			}
		case payloadBytes(e) == 0:
			bytes += entryOverhead
		default:
			return ps, bytes, have
		}
		have++
	}
	return ps, bytes, have
}

// held finds an entry in memory, the more complete form first.
func (g *Group) held(e *pb.Entry) *held {
	i, term := e.GetIndex(), e.GetTerm()
	en := g.tail.at(i)
	if en != nil && en.entry.GetTerm() == term && en.complete() {
		return en
	}
	if w := g.windowAt(i); w != nil && w.ents[i-w.first].entry.GetTerm() == term {
		return &w.ents[i-w.first]
	}
	if en != nil && en.entry.GetTerm() == term {
		return en
	}
	return nil
}

// acknowledged takes a follower's answer to appends into account.
func (g *Group) acknowledged(m *pb.Message) {
	for _, f := range g.followers {
		if uint64(f.replica) != m.GetFrom() {
			continue
		}
		l := f.lane
		l.heard = g.host.ticks
		for len(f.sent) > 0 && (m.GetReject() || f.sent[0].index <= m.GetIndex()) {
			l.inflight -= f.sent[0].bytes
			f.sent = f.sent[1:]
		}
		if m.GetReject() {
			f.queue = nil // Raft goes back and sends again
		}
		g.host.wake(l)
	}
}

// wake lets those go on that the budget of a lane held back.
func (h *Host) wake(l *lane) {
	waiting := l.waiting
	l.waiting = nil
	for _, f := range waiting {
		f.waiting = false
		h.mark(f.group)
	}
}

// forget drops what waits for a follower and what its budget holds.
func (g *Group) forget(f *follower) {
	for _, s := range f.sent {
		f.lane.inflight -= s.bytes
	}
	f.queue, f.sent = nil, nil
	g.host.wake(f.lane)
}

// lost says that appends to f may not have arrived.
func (g *Group) lost(f *follower) {
	g.forget(f)
	if g.raft != nil && g.Leading() {
		g.raft.ReportUnreachable(uint64(f.replica))
	}
}

func (g *Group) unreachable(node block.NodeID) {
	for _, f := range g.followers {
		if f.lane.node == node {
			g.lost(f)
		}
	}
}

// resume goes on with followers after entries for them were read. Those whose
// turn it is are found by Raft itself, when it believes to hear from them; it
// is told so only of members it did hear from lately.
func (g *Group) resume() {
	if !g.Leading() {
		return
	}
	last := g.lastIndex()
	var behind []uint64
	g.raft.WithProgress(func(id uint64, _ raft.ProgressType, pr tracker.Progress) {
		if id != uint64(g.cfg.Replica) && pr.RecentActive && pr.Match < last {
			behind = append(behind, id)
		}
	})
	self := uint64(g.cfg.Replica)
	for _, id := range behind {
		term := g.hard.Term
		g.step(&pb.Message{Type: pb.MsgHeartbeatResp.Enum(), From: &id, To: &self, Term: &term})
	}
	g.host.mark(g)
}

// watchLane counts what a silent node was sent as lost, so that a message that
// vanished does not hold its budget for ever.
func (h *Host) watchLane(l *lane) {
	if l.inflight > 0 && h.ticks-l.heard > silentTicks {
		l.heard = h.ticks
		for _, g := range h.order {
			g.unreachable(l.node)
		}
	}
}

// beat adds a heartbeat or its answer to those of the turn.
func (g *Group) beat(l *lane, m *pb.Message) {
	slowest := uint64(0)
	if m.GetType() == pb.MsgHeartbeat {
		g.slowest = max(g.slowest, g.findSlowest())
		slowest = g.slowest
	}
	l.beats = appendBeat(l.beats, g.cfg.Group, m, slowest)
	l.beatCount++
	if len(l.beats) > transport.MaxHeaderBytes-1024 {
		g.host.sendBeats(l)
	}
	g.host.flushLater()
}

func (g *Group) findSlowest() uint64 {
	low := g.lastIndex()
	g.raft.WithProgress(func(_ uint64, _ raft.ProgressType, pr tracker.Progress) { low = min(low, pr.Match) })
	return low
}

func (h *Host) sendBeats(l *lane) {
	if l.beatCount == 0 {
		return
	}
	header := l.beats
	l.beats, l.beatCount = nil, 0
	h.counters.Heartbeats++
	h.post(l.node, transport.Control, transport.Message{Type: transport.TypeHeartbeat, Header: header})
}
