package raftgroup

import (
	"go.etcd.io/raft/v3"
	pb "go.etcd.io/raft/v3/raftpb"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/internal/block"
)

// A follower that needs entries which the leader has truncated is filled from
// the state of another replica. Raft's snapshot message only tells it so: it
// carries an index and no state. The follower is closed, its owner fetches what
// differs, from whom it likes, and opens it again above that index; so the
// library never restores a snapshot, and a copy outlives any change of leader.
//
// Then the leader offers once more, and the follower answers how far it is,
// which the log reaches.

// offerTicks is when a leader offers again to a follower that has not answered.
const offerTicks = 20

// Snapshot implements raft.Storage. Raft asks when the log no longer has what a
// follower needs; but also when that is only being read back.
func (s storage) Snapshot() (*pb.Snapshot, error) {
	g := s.g
	if g.loadsFor != 0 {
		g.loadsFor = 0
		return nil, raft.ErrSnapshotTemporarilyUnavailable
	}
	index, term := g.applied.Index, g.applied.Term
	return &pb.Snapshot{Metadata: &pb.SnapshotMetadata{Index: &index, Term: &term, ConfState: g.conf.state()}}, nil
}

// offer tells a follower that it is behind the log.
func (g *Group) offer(m *pb.Message) {
	f := g.followerOf(block.ReplicaID(m.GetTo()))
	if f == nil {
		return
	}
	g.forget(f)
	f.offered = max(g.host.ticks, 1) // 0: it was not
	g.host.counters.Offers++
	at := m.GetSnapshot().GetMetadata()
	from := g.cfg.Log.FirstIndex() - 1
	told := &pb.Message{Type: m.Type, To: m.To, From: m.From, Term: m.Term, Index: at.Index, LogTerm: at.Term, Commit: &from}
	g.host.post(f.lane.node, transport.Data, transport.Message{Type: transport.TypeRaft, Header: appendMessage(nil, g.cfg.Group, told)})
}

// watchOffers lets Raft try anew with followers that did not answer an offer.
func (g *Group) watchOffers() {
	for _, f := range g.followers {
		if f.offered != 0 && g.host.ticks-f.offered >= offerTicks {
			f.offered = 0
			g.raft.ReportSnapshot(uint64(f.replica), raft.SnapshotFailure)
		}
	}
}

// offered takes a leader's word that its log has forgotten what this replica
// would need next, as far as that leader knows what it has. It is not given to
// Raft.
func (g *Group) offered(m *pb.Message) {
	if m.GetTerm() != g.hard.Term || g.Leading() {
		return // an old leader; or a new one, whom Raft gets to know by its heartbeats
	}
	from := block.ReplicaID(m.GetFrom())
	if g.applied.Index >= m.GetCommit() {
		// What is applied is committed, so the leader has the same up to there.
		self, term, index := uint64(g.cfg.Replica), g.hard.Term, g.applied.Index
		g.send(&pb.Message{Type: pb.MsgAppResp.Enum(), To: m.From, From: &self, Term: &term, Index: &index})
		return
	}
	node, ok := g.nodeOf(from)
	if !ok || g.cfg.Behind == nil {
		return
	}
	at := EntryID{Index: m.GetIndex(), Term: m.GetLogTerm()}
	g.host.loop.Post(func() {
		if !g.closed && g.failed == nil {
			g.cfg.Behind(g, node, at)
		}
	})
}

// learn remembers the node of a replica that wrote to this one and that its
// members do not know: it may have missed how they changed.
func (g *Group) learn(from block.NodeID, replica block.ReplicaID) {
	if _, known := g.conf.NodeOf(replica); known || from == 0 {
		return
	}
	if g.routes == nil || len(g.routes) >= confMaxMembers {
		g.routes = make(map[block.ReplicaID]block.NodeID)
	}
	g.routes[replica] = from
}

// nodeOf returns the node of a replica to answer.
func (g *Group) nodeOf(replica block.ReplicaID) (block.NodeID, bool) {
	if n, ok := g.conf.NodeOf(replica); ok {
		return n, true
	}
	n, ok := g.routes[replica]
	return n, ok
}
